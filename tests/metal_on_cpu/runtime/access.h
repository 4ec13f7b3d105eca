// Every instrumented memory access: bounds, alignment, initialization, and whether it is ordered with the others.
#pragma once
#include "fiber.h"

// Does what `e` records happen before the current lane's access? space: 1 device, 2 threadgroup memory.
static bool is_ordered(const Epoch& e, int space) {
  if (e.threadgroup != threadgroup_now) return false;
  if (e.thread == current->index || e.epoch != barrier_epoch[space]) return true;
  return e.simdgroup == current->simdgroup && e.simd_epoch != simdgroups[current->simdgroup].epoch[space];
}

// A second unordered write is harmless when it stores the value that was there: known one event later.
static struct PendingWrite {
  bool on;
  uint8_t* p;
  uint32_t size;
  uint8_t old[16];
  uint64_t pc, pc2, offset;
  int region;
  uint32_t thread2;
} pending;

static void settle_pending_write() {
  if (!pending.on) return;
  pending.on = false;
  int code = memcmp(pending.old, pending.p, pending.size) ? RACE_WRITE_WRITE : SAME_WRITE_WRITE;
  finding(code, pending.pc, pending.pc2, pending.region, pending.offset, pending.size, pending.thread2);
}

struct Touch {
  Region& r;
  int region;
  uint64_t offset;
  uint32_t size;
  bool write, atomic;
  uint64_t pc;
  uint32_t place, width;  // in the source, and how many bytes the text accesses there; 0: not known
};

static void check_against_write(const Touch& t, const Epoch& w, int space) {
  if (!(w.flags & SET) || (space == 2 && w.threadgroup != threadgroup_now)) return;
  if ((t.atomic && (w.flags & ATOMIC)) || is_ordered(w, space)) return;
  uint64_t pc2 = module_base + w.pc;
  if (!t.write) {
    finding(RACE_READ_WRITE, t.pc, pc2, t.region, t.offset, t.size, w.thread);
    return;
  }
  pending = PendingWrite{true, t.r.low + t.offset, t.size, {}, t.pc, pc2, t.offset, t.region, w.thread};
  memcpy(pending.old, pending.p, pending.size);
}

static void check_against_reads(const Touch& t, const Shadow& s, int space) {
  for (const Epoch& e : s.reads) {
    if (!(e.flags & SET) || (space == 2 && e.threadgroup != threadgroup_now) || (t.atomic && (e.flags & ATOMIC)))
      continue;
    bool simd_ordered =
        e.simdgroup == current->simdgroup && e.simd_epoch != simdgroups[current->simdgroup].epoch[space];
    bool others = (e.flags & SEVERAL_THREADS) && e.threadgroup == threadgroup_now && e.epoch == barrier_epoch[space] &&
                  !simd_ordered;
    if (others || !is_ordered(e, space))
      finding(RACE_READ_WRITE, t.pc, module_base + e.pc, t.region, t.offset, t.size, e.thread);
  }
}

static void remember_read(Shadow& s, const Epoch& me) {
  auto same_simdgroup = [&](const Epoch& e) {
    return (e.flags & SET) && e.threadgroup == threadgroup_now && e.simdgroup == current->simdgroup;
  };
  Epoch &e0 = s.reads[0], &e1 = s.reads[1];
  Epoch* e = same_simdgroup(e0) ? &e0 : same_simdgroup(e1) ? &e1 : !(e0.flags & SET) ? &e0 : &e1;
  if ((e0.flags & SET) && (e1.flags & SET) && !same_simdgroup(*e))  // drop the older one
    e = e0.threadgroup == threadgroup_now && e0.epoch == me.epoch ? &e1 : &e0;
  bool several = same_simdgroup(*e) && e->epoch == me.epoch && e->simd_epoch == me.simd_epoch &&
                 (e->thread != me.thread || (e->flags & SEVERAL_THREADS));
  *e = me;
  if (several) e->flags |= SEVERAL_THREADS;
}

static void check_races(const Touch& t) {
  int space = t.r.kind == THREADGROUP ? 2 : 1;
  uint64_t first = t.offset / t.r.granule, last = (t.offset + t.size - 1) / t.r.granule;
  Epoch me{threadgroup_now,
           barrier_epoch[space],
           simdgroups[current->simdgroup].epoch[space],
           pc_offset(t.pc),
           (uint16_t)current->index,
           (uint8_t)current->simdgroup,
           (uint8_t)(SET | (t.atomic ? ATOMIC : 0))};
  for (uint64_t g = first; g <= last; g++) {
    Shadow& s = t.r.kind == THREADGROUP ? arena_shadow[g] : t.r.shadow[g];
    if (t.r.kind == THREADGROUP && s.write.threadgroup != threadgroup_now && !t.write)
      finding(UNINITIALIZED_THREADGROUP, t.pc, 0, t.region, t.offset, t.size);
    check_against_write(t, s.write, space);
    if (t.write) {
      check_against_reads(t, s, space);
      s.write = me;
      s.reads[0].flags = s.reads[1].flags = 0;
    } else {
      remember_read(s, me);
    }
  }
}

static void mark(std::vector<uint8_t>& bits, uint64_t offset, uint32_t size) {
  uint64_t i = offset, end = offset + size;
  if (!(i & 7))
    for (; i + 8 <= end; i += 8) bits[i >> 3] = 255;
  if ((i & 7) + (end - i) <= 8) {
    bits[i >> 3] |= ((1u << (end - i)) - 1) << (i & 7);
  } else {
    for (; i < end; i++) bits[i >> 3] |= 1 << (i & 7);
  }
}

static bool is_marked(const std::vector<uint8_t>& bits, uint64_t offset, uint32_t size) {
  for (uint64_t i = offset; i < offset + size; i++)
    if (!(bits[i >> 3] >> (i & 7) & 1)) return false;
  return true;
}

static void outside_every_region(uint64_t a, uint32_t size, bool write, uint64_t pc) {
  if (in_kernel_module(a)) {  // program-scope constants
    if (write) finding(READ_ONLY_WRITE, pc, 0, PROGRAM_REGION, a - module_base, size);
    return;
  }
  if (a >= (uint64_t)__ehdr_start && a < (uint64_t)_end) return;  // the payload of a lane that gave none
  if (a - (uint64_t)stacks[0] < (uint64_t)(stacks.back() + STACK - stacks[0])) {
    finding(OTHER_STACK, pc, 0, NO_REGION, 0, size);
    return;
  }
  int nearest = NO_REGION;
  int64_t distance = GAP;
  for (size_t i = 0; i < regions.size(); i++) {
    int64_t d = (int64_t)(a - (uint64_t)regions[i].low);
    int64_t over = d < 0 ? -d : d - (int64_t)regions[i].size + 1;
    if (over < distance) distance = over, nearest = (int)i;
  }
  finding(write ? OOB_WRITE : OOB_READ, pc, 0, nearest, nearest >= 0 ? a - (uint64_t)regions[nearest].low : a, size);
  if (!config.keep_going || nearest < 0 || write) stop_run();
}

static bool in_variable(uint64_t offset, uint32_t size) {
  for (auto& v : variables)
    if (offset >= v.offset && offset + size <= (uint64_t)v.offset + v.size) return true;
  return false;
}

static int region_of(uint64_t a) {
  static uint32_t last;
  if (last < regions.size() && a - (uint64_t)regions[last].low < regions[last].size) return (int)last;
  for (size_t i = 0; i < regions.size(); i++)
    if (a - (uint64_t)regions[i].low < regions[i].size) return (int)(last = (uint32_t)i);
  return NO_REGION;
}

// Adds an access to an earlier piece of the same one: the optimizer splits those of vectors.
static bool join(const Touch& t, uint64_t address) {
  auto& log = current->log;
  for (size_t i = log.size(); t.place && i > 0 && i + 16 > log.size(); i--) {
    Access& a = log[i - 1];
    if (a.place != t.place || a.write != t.write || a.region != t.region || a.size + t.size > t.width) continue;
    if (a.address + a.size != address && address + t.size != a.address) continue;
    a.address = std::min(a.address, address);
    a.size += t.size;
    return true;
  }
  return false;
}

static void count_access(Region& r, const Touch& t) {
  uint64_t address = (uint64_t)r.low + t.offset;
  bool joined = join(t, address);
  if (t.write) {
    r.stores += !joined, r.store_bytes += t.size;
  } else {
    r.loads += !joined, r.load_bytes += t.size;
  }
  if (r.kind == THREADGROUP) return;
  if (t.write) {
    mark(r.written, t.offset, t.size);
  } else {
    mark(r.read, t.offset, t.size);
    for (uint64_t k = t.offset >> 7; k <= (t.offset + t.size - 1) >> 7; k++) {
      LoadedLine& line = r.lines[k];
      if (line.threadgroup != threadgroup_now) line = {threadgroup_now, 0}, r.threadgroup_lines++;
      uint32_t bit = 1u << current->simdgroup;
      if (!(line.simdgroups & bit)) line.simdgroups |= bit, r.simdgroup_lines++;
    }
  }
  if (joined) return;
  current->log.push_back({address, pc_offset(t.pc), t.place, (uint8_t)t.size, t.write, (uint8_t)t.region});
  logged++;
}

static __attribute__((noinline)) void on_access(uint64_t a, uint32_t size, bool write, bool atomic, uint64_t pc,
                                                uint32_t alignment, uint32_t place = 0, uint32_t width = 0) {
  Lane* l = current;
  if (!l || a - (uint64_t)payload_slots < sizeof payload_slots) return;  // what another lane published
  last_pc = pc;
  stop_if_expired(pc);
  settle_pending_write();
  if (a - (uint64_t)l->stack < STACK) return;  // `thread` memory
  accesses++;
  int index = region_of(a);
  if (index < 0) return outside_every_region(a, size, write, pc);
  Region& r = regions[index];
  uint64_t offset = a - (uint64_t)r.low;
  if (r.kind == THREADGROUP ? !in_variable(offset, size) : offset + size > r.size) {
    finding(write ? OOB_WRITE : OOB_READ, pc, 0, index, offset, size);
    if (!config.keep_going || write) stop_run();
    return;
  }
  if (a % alignment) finding(MISALIGNED, pc, 0, index, offset, size);
  if (write && (r.kind == DEVICE_IN || r.kind == CONSTANT)) {
    finding(READ_ONLY_WRITE, pc, 0, index, offset, size);
    stop_run();
  }
  if (!write && r.kind == DEVICE_OUT && !config.initialized && !is_marked(r.written, offset, size))
    finding(UNINITIALIZED_OUTPUT, pc, 0, index, offset, size);
  Touch t{r, index, offset, size, write, atomic, pc, place, width};
  count_access(r, t);
  if (r.kind == DEVICE_OUT || r.kind == THREADGROUP) check_races(t);
}
