// What the runtime knows while it runs one kernel: the launch, its lanes, its memory, what was found and counted.
// One translation unit (runtime.cpp) includes all of these headers; the state is global because a worker process runs
// one launch at a time.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

extern "C" {
// Both are filled in by worker.py: keep them equal.
struct MslBuffer {
  uint64_t offset, nbytes, start;  // in the shared file; size; where the kernel's pointer stands in it
  int32_t kind, itemsize;          // a Kind below
};
struct MslConfig {
  uint32_t grid[3], threadgroup[3], nbuffers, check, order, flush_denormals, keep_going, threadgroup_limit, initialized,
      time_limit_ms;
  uint64_t seed, first_threadgroup, n_threadgroups;  // which run; 0: all
};
struct U3 {
  uint32_t x, y, z;
};
struct ThreadId {  // __msl_tid of the shim
  U3 in_grid, in_threadgroup, threadgroup, grid, threadgroup_size, threadgroups, dispatch_size;
  uint32_t index, lane, simdgroup, simdgroups;
};
typedef void (*Entry)(void* const* buffers, const ThreadId* thread);
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace {
enum Kind { DEVICE_IN, DEVICE_OUT, CONSTANT, THREADGROUP };
enum Sync { THREADGROUP_BARRIER = 1, SIMDGROUP_BARRIER = 2, SIMD = 3, QUAD = 4 };
enum LaneState { READY, WAITING, DONE };
enum Order { FORWARD, REVERSE, RANDOM };
// The names are in report.py, in this order.
enum Code {
  OOB_READ = 1,
  OOB_WRITE,
  READ_ONLY_WRITE,
  RACE_WRITE_WRITE,
  RACE_READ_WRITE,
  UNINITIALIZED_THREADGROUP,
  DIVERGENT_SIMD,
  DIVERGENT_BARRIER,
  DEAD_LANE,
  THREADGROUP_LIMIT,
  EXITED_BARRIER,
  UNWRITTEN,
  MISALIGNED,
  CRASH,
  OTHER_STACK,
  UNINITIALIZED_OUTPUT,
  UNDEFINED,
  SAME_WRITE_WRITE,
  PARTIAL_SIMD,
  TIME_LIMIT,
};
constexpr int THREADGROUP_REGION = -3, PROGRAM_REGION = -2, NO_REGION = -1;  // in the report
constexpr size_t STACK = 128 << 10, GUARD = 64 << 10, GAP = 64 << 10, PAGE = 64 << 10;
constexpr uint32_t MAX_THREADS = 1024, ARENA = 128 << 10;

struct Access {  // one lane's access, kept until its SIMD-group's are matched
  uint64_t address;
  uint32_t pc, place;
  uint8_t size, write, region;
};
struct Lane {
  void* sp;
  LaneState state;
  uint32_t kind, arg, index;  // of the call at which the lane waits; index in the threadgroup
  uint64_t pc;
  uint8_t* stack;
  uint32_t simdgroup, lane, active;
  uint8_t parity;  // which of its two payload slots was published last
  ThreadId id;
  std::vector<Access> log;
  uint8_t (*slots)[64];
};
struct Epoch {  // who touched a granule last: threadgroup, barrier epochs, instruction, thread
  uint32_t threadgroup, epoch, simd_epoch, pc;
  uint16_t thread;
  uint8_t simdgroup, flags;
};
enum EpochFlags { SET = 1, ATOMIC = 2, SEVERAL_THREADS = 4 };
struct Shadow {
  Epoch write, reads[2];
};
struct LoadedLine {  // the last threadgroup that loaded from a 128-byte line, and which of its SIMD-groups did (a bit each)
  uint32_t threadgroup, simdgroups;
};
struct Region {  // one buffer, or the threadgroup arena
  uint8_t* low;
  uint64_t size;
  int kind, itemsize;
  uint64_t granule;  // bytes of memory a shadow entry
  std::vector<Shadow> shadow;
  std::vector<uint8_t> read, written;  // a bit a byte
  std::vector<LoadedLine> lines;
  uint64_t loads = 0, stores = 0, load_bytes = 0, store_bytes = 0, threadgroup_lines = 0, simdgroup_lines = 0;
};
struct Site {  // one memory instruction
  uint64_t execs = 0, lanes = 0, bytes = 0, unique = 0, lines32 = 0, lines64 = 0, lines128 = 0;
  int region = NO_REGION, write = 0, size = 0;
};
struct Finding {
  int code;
  uint64_t pc, pc2, offset, count;
  int region;
  uint32_t threadgroup, thread, thread2, size;
  std::string text;
};
struct SimdGroup {
  std::vector<Lane*> lanes;
  const uint8_t* view[32];  // published payloads
  uint32_t epoch[3];
};
struct Variable {  // a threadgroup variable in the arena
  uint32_t id, offset, size;
};

MslConfig config;
Entry entry;
uint64_t module_base, module_end;  // of the kernel's shared library
std::vector<void*> kernel_arguments;

std::vector<uint8_t*> stacks;
std::vector<Lane*> lanes;
std::vector<SimdGroup> simdgroups;
Lane* current;  // the lane that runs now; null in the scheduler
void* scheduler_sp;
jmp_buf abort_run;
volatile int running, expired;

std::vector<Region> regions;
uint8_t* arena;
int arena_region;
uint32_t arena_used, arena_top;
std::vector<Variable> variables;
std::vector<Shadow> arena_shadow;
alignas(64) uint8_t poison[64], payload_slots[MAX_THREADS][2][64];

uint32_t threadgroup_now, threadgroup_base;  // unique over launches, so that old shadows are old
uint32_t barrier_epoch[3], last_epoch = 1;   // index 1 device, 2 threadgroup memory
std::map<std::tuple<int, uint64_t, uint64_t, int>, Finding> findings;
std::unordered_map<uint32_t, Site> sites;
std::vector<uint64_t> block_counts;
uint64_t random_state, switches, accesses, logged, last_pc, threadgroups_done, threadgroups_total;

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

uint32_t pc_offset(uint64_t pc) { return (uint32_t)(pc - module_base); }

bool in_kernel_module(uint64_t address) { return address >= module_base && address < module_end; }

Finding& finding(int code, uint64_t pc, uint64_t pc2 = 0, int region = NO_REGION, uint64_t offset = 0,
                 uint32_t size = 0, uint32_t thread2 = 0) {
  Finding& f = findings[{code, pc, pc2, region}];
  if (!f.count++) {
    f.code = code, f.pc = pc, f.pc2 = pc2, f.region = region, f.offset = offset, f.size = size;
    f.threadgroup = threadgroup_now, f.thread = current ? current->index : 0, f.thread2 = thread2;
  }
  return f;
}

[[noreturn]] void stop_run() { longjmp(abort_run, 1); }

void stop_if_expired(uint64_t pc) {
  if (!expired) return;
  finding(TIME_LIMIT, pc);
  stop_run();
}
}  // namespace
