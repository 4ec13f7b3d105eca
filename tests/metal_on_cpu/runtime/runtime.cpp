// Runs one Metal compute kernel on a CPU. Every GPU thread is a fiber; a scheduler runs the 32 lanes of a SIMD-group up
// to their next synchronizing call and resolves it. The kernel is compiled with -fsanitize=thread: instead of that
// sanitizer's runtime, the callbacks here check bounds, find unordered accesses and count traffic.
#include <dlfcn.h>
#include <link.h>
#include <sys/time.h>
#include <ucontext.h>

#include <csignal>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "scheduler.h"

static uint64_t interrupted_pc(void* context) {
#if defined(__x86_64__)
  return (uint64_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#else
  return (uint64_t)((ucontext_t*)context)->uc_mcontext.pc;
#endif
}

#if defined(__x86_64__)
constexpr uint64_t FLUSH_DENORMALS = 0x8040;
static uint64_t float_control() { return _mm_getcsr(); }
static void set_float_control(uint64_t mode) { _mm_setcsr((uint32_t)mode); }
#else
constexpr uint64_t FLUSH_DENORMALS = 1 << 24;
static uint64_t float_control() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
static void set_float_control(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#endif

static void unblock(int sig) {
  sigset_t s;
  sigemptyset(&s);
  sigaddset(&s, sig);
  sigprocmask(SIG_UNBLOCK, &s, nullptr);
}

// Where it interrupts the kernel's own code the run may be left at once, elsewhere the next callback does it.
static void on_time(int sig, siginfo_t*, void* context) {
  if (!running) return;
  expired = 1;
  uint64_t pc = interrupted_pc(context);
  if (!current || !in_kernel_module(pc)) return;
  unblock(sig);
  stop_if_expired(pc + 1);
}

static void on_fault(int sig, siginfo_t* info, void* context) {
  if (!running) {
    signal(sig, SIG_DFL);
    return;
  }
  bool trap = sig == SIGILL || sig == SIGTRAP;
  uint64_t pc = interrupted_pc(context);
  Finding& f = finding(CRASH, in_kernel_module(pc) ? pc + 1 : last_pc, 0, NO_REGION, (uint64_t)info->si_addr);
  bool overflow = current && (uint64_t)current->stack - (uint64_t)info->si_addr <= GUARD;
  if (f.text.empty())
    f.text = trap            ? "index out of the bounds of a thread array"
             : overflow      ? "a thread's stack is full"
             : sig == SIGFPE ? "arithmetic fault"
                             : "memory fault";
  unblock(sig);
  stop_run();
}

struct Handlers {
  static constexpr int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction old[5], old_time;
  stack_t old_stack;

  void install() {
    static uint8_t alternate[65536];
    stack_t s{};
    s.ss_sp = alternate, s.ss_size = sizeof alternate;
    sigaltstack(&s, &old_stack);
    struct sigaction a{};
    a.sa_flags = SA_SIGINFO | SA_ONSTACK;
    a.sa_sigaction = on_fault;
    for (int i = 0; i < 5; i++) sigaction(faults[i], &a, &old[i]);
    a.sa_sigaction = on_time;
    sigaction(SIGPROF, &a, &old_time);
    set_timer(config.time_limit_ms);
  }
  void restore() {
    set_timer(0);
    for (int i = 0; i < 5; i++) sigaction(faults[i], &old[i], nullptr);
    sigaction(SIGPROF, &old_time, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
  static void set_timer(uint32_t ms) {  // processor time, so that a busy machine shortens nothing
    itimerval t{};
    if (ms) t.it_value = {ms / 1000, (ms % 1000) * 1000}, t.it_interval = {0, 20000};
    setitimer(ITIMER_PROF, &t, nullptr);
  }
};

// Each buffer between gaps in which nothing is mapped (with keep_going: in which zeros are read).
static void map_buffers(int fd, const MslBuffer* buffers, std::vector<std::pair<void*, size_t>>& maps) {
  for (uint32_t i = 0; i < config.nbuffers; i++) {
    const MslBuffer& b = buffers[i];
    size_t length = std::max<size_t>((b.nbytes + PAGE - 1) / PAGE * PAGE, PAGE);
    int gap = config.keep_going ? PROT_READ : PROT_NONE;
    uint8_t* m = (uint8_t*)mmap(nullptr, length + 2 * GAP, gap, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    maps.push_back({m, length + 2 * GAP});
    bool out = b.kind == DEVICE_OUT;
    mmap(m + GAP, length, PROT_READ | PROT_WRITE, MAP_FIXED | (out ? MAP_SHARED : MAP_PRIVATE), fd, (off_t)b.offset);
    Region r;
    r.low = m + GAP, r.size = b.nbytes, r.kind = b.kind, r.itemsize = b.itemsize;
    r.granule = r.size > (1u << 20) ? r.itemsize : 1;
    if (config.check) {
      r.read.resize(r.size / 8 + 2);
      r.written.resize(r.size / 8 + 2);
      r.lines.resize(r.size / 128 + 2);
      if (out) r.shadow.resize(r.size / r.granule + 2);
    }
    regions.push_back(std::move(r));
    kernel_arguments.push_back(m + GAP + b.start);
  }
}

static void map_arena() {
  if (!arena)
    arena = (uint8_t*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (config.check && arena_shadow.empty()) arena_shadow.resize(ARENA);
  memset(arena, 0xCD, ARENA);
  Region r;
  r.low = arena, r.size = ARENA, r.kind = THREADGROUP, r.itemsize = 1, r.granule = 1;
  arena_region = (int)regions.size();
  regions.push_back(std::move(r));
}

static int find_module_end(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_addr != module_base) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_LOAD)
      module_end =
          std::max<uint64_t>(module_end, module_base + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  return 1;
}

static void reset(void* kernel, const MslConfig* c, uint32_t nblocks) {
  config = *c;
  entry = (Entry)kernel;
  Dl_info info;
  dladdr(kernel, &info);
  module_base = module_end = (uint64_t)info.dli_fbase;
  dl_iterate_phdr(find_module_end, nullptr);
  regions.clear(), kernel_arguments.clear(), findings.clear(), sites.clear(), variables.clear();
  block_counts.assign(nblocks, 0);
  arena_used = arena_top = 0;
  random_state = config.seed * 2654435761u + 88172645463325252ull;
  switches = accesses = logged = last_pc = threadgroups_done = threadgroups_total = 0;
  pending.on = false, expired = 0, current = nullptr;
  memset(poison, 0xCD, sizeof poison);
}

static void find_unwritten() {
  for (size_t i = 0; i < config.nbuffers; i++) {
    Region& r = regions[i];
    if (r.kind != DEVICE_OUT) continue;
    uint64_t missing = 0, first = 0;
    for (uint64_t b = 0; b < r.size; b++)
      if (!(r.written[b >> 3] >> (b & 7) & 1) && !missing++) first = b;
    if (missing) finding(UNWRITTEN, 0, 0, (int)i, first).count = missing;
  }
}

struct Report {  // rows of numbers that report.py reads
  std::string text;
  template <class... A>
  void row(const char* format, A... a) {
    char b[1024];
    snprintf(b, sizeof b, format, a...);
    text += b;
  }
};
typedef unsigned long long ull;

static uint64_t ones(const std::vector<uint8_t>& bits) {
  uint64_t n = 0;
  for (auto b : bits) n += __builtin_popcount(b);
  return n;
}

static std::string report(bool aborted) {
  Report out;
  out.row("run\t%d\t%llu\t%llu\t%llu\t%u\n", (int)aborted, (ull)threadgroups_done, (ull)switches, (ull)accesses,
          arena_used);
  for (auto& k : findings) {
    const Finding& f = k.second;
    uint64_t pc = f.code == UNDEFINED || !f.pc ? 0 : pc_offset(f.pc);
    out.row("finding\t%d\t%llu\t%llu\t%d\t%llu\t%llu\t%u\t%u\t%u\t%u\t%s\n", f.code, (ull)pc,
            (ull)(f.pc2 ? pc_offset(f.pc2) : 0), f.region == arena_region ? THREADGROUP_REGION : f.region,
            (ull)f.offset, (ull)f.count, f.threadgroup ? f.threadgroup - threadgroup_base - 1 : 0, f.thread, f.thread2,
            f.size, f.text.c_str());
  }
  for (size_t i = 0; config.check && i < regions.size(); i++) {
    const Region& r = regions[i];
    out.row("region\t%d\t%d\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\n",
            (int)i == arena_region ? THREADGROUP_REGION : (int)i, r.kind, (ull)r.size, (ull)r.loads, (ull)r.load_bytes,
            (ull)r.stores, (ull)r.store_bytes, (ull)ones(r.read), (ull)ones(r.written), (ull)r.threadgroup_lines,
            (ull)r.simdgroup_lines);
  }
  for (auto& k : sites) {
    const Site& s = k.second;
    out.row("site\t%u\t%d\t%d\t%d\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\n", k.first, s.region, s.write, s.size,
            (ull)s.execs, (ull)s.lanes, (ull)s.bytes, (ull)s.unique, (ull)s.lines32, (ull)s.lines64, (ull)s.lines128);
  }
  for (size_t i = 0; i < block_counts.size(); i++)
    if (block_counts[i]) out.row("block\t%zu\t%llu\n", i, (ull)block_counts[i]);
  return out.text;
}

// Runs `kernel` (the __msl_entry of a kernel's library) on buffers that lie in file `fd`; returns the report's length,
// negative when the process should not be used again.
extern "C" int64_t msl_run(void* kernel, const MslConfig* c, int fd, const MslBuffer* buffers, uint32_t nblocks,
                           char* text, uint64_t capacity) {
  reset(kernel, c, nblocks);
  std::vector<std::pair<void*, size_t>> maps;
  map_buffers(fd, buffers, maps);
  map_arena();
  map_stacks();
  Handlers handlers;
  handlers.install();
  uint64_t float_mode = float_control();
  if (config.flush_denormals) set_float_control(float_mode | FLUSH_DENORMALS);
  volatile bool aborted = true;
  running = 1;
  if (!setjmp(abort_run)) {
    run_grid();
    aborted = false;
  }
  running = 0, current = nullptr;
  set_float_control(float_mode);
  handlers.restore();
  if (config.check && !aborted) find_unwritten();
  std::string out = report(aborted);
  threadgroup_base += (uint32_t)threadgroups_total + 1;
  bool broken = expired;
  for (auto& f : findings) broken = broken || f.second.code == CRASH;
  for (auto& m : maps) munmap(m.first, m.second);
  size_t n = std::min<size_t>(capacity, out.size());
  memcpy(text, out.data(), n);
  return broken ? -(int64_t)n : (int64_t)n;
}
