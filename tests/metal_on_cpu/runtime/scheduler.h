// Runs the lanes of a threadgroup: each SIMD-group up to a barrier of the whole threadgroup, then all of them on.
#pragma once
#include "callbacks.h"
#include "traffic.h"

template <class T>
static void permute(std::vector<T>& v) {
  if (config.order == REVERSE) std::reverse(v.begin(), v.end());
  if (config.order == RANDOM)
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[next_random() % i]);
}

static void finding_of(Lane* l, int code, Lane* other = nullptr, uint64_t pc2 = 0) {
  current = l;
  finding(code, l->pc, pc2, NO_REGION, 0, 0, other ? other->index : 0);
  current = nullptr;
}

// The lanes that wait at one call of a SIMD function get each other's payloads and go on.
static void release_simd(SimdGroup& sg, const std::vector<Lane*>& live) {
  Lane *lead = nullptr, *other = nullptr;
  for (auto* l : live)
    if (!lead && l->kind != THREADGROUP_BARRIER) lead = l;
  std::vector<Lane*> together;
  for (auto* l : live) {
    if (l->kind == lead->kind && l->pc == lead->pc) {
      together.push_back(l);
    } else if (!other) {
      other = l;
    }
  }
  if (other && lead->kind != QUAD) {
    finding_of(lead, DIVERGENT_SIMD, other, other->pc);
  } else if (live.size() < sg.lanes.size() && lead->kind == SIMD) {
    finding_of(lead, PARTIAL_SIMD);
  }
  uint32_t active = 0;
  for (auto* l : together) active |= 1u << l->lane;
  for (auto* l : together) {
    sg.view[l->lane] = l->slots[l->parity];
    l->active = active;
    l->state = READY;
  }
  if (lead->kind != SIMDGROUP_BARRIER) return;
  if (config.check) flush_log(sg);
  for (int space : {1, 2})
    if (lead->arg & space) sg.epoch[space] = ++last_epoch;
}

// Until every live lane waits at a threadgroup barrier.
static void run_simdgroup(SimdGroup& sg) {
  for (;;) {
    std::vector<Lane*> order = sg.lanes;
    permute(order);
    for (auto* l : order)
      if (l->state == READY) resume(l);
    std::vector<Lane*> live;
    bool all_at_barrier = true;
    for (auto* l : sg.lanes) {
      if (l->state == DONE) continue;
      live.push_back(l);
      all_at_barrier = all_at_barrier && l->kind == THREADGROUP_BARRIER;
    }
    if (config.check && (all_at_barrier || logged > 65536)) flush_log(sg);
    if (all_at_barrier) return;
    release_simd(sg, live);
  }
}

static void start_threadgroup(uint32_t n) {
  simdgroups.resize((n + 31) / 32);
  for (int space : {1, 2}) barrier_epoch[space] = ++last_epoch;
  for (auto& sg : simdgroups) {
    sg.lanes.clear();
    for (int space : {1, 2}) sg.epoch[space] = ++last_epoch;
  }
  for (uint32_t i = 0; i < n; i++) {
    Lane* l = lanes[i];
    l->stack = stacks[i], l->slots = payload_slots[i];
    l->state = READY, l->index = i, l->simdgroup = i / 32, l->lane = i % 32, l->parity = 0;
    l->log.clear();
    l->sp = new_stack(l->stack + STACK, fiber_main);
    simdgroups[i / 32].lanes.push_back(l);
  }
}

// All live lanes stand at a barrier: true when there are none.
static bool release_barrier(uint32_t n) {
  Lane *waiting = nullptr, *done = nullptr, *elsewhere = nullptr;
  uint32_t flags = ~0u;
  for (uint32_t i = 0; i < n; i++) {
    Lane* l = lanes[i];
    if (l->state == DONE) {
      done = l;
      continue;
    }
    if (!waiting) waiting = l;
    if (l->pc != waiting->pc) elsewhere = l;
    flags &= l->arg;
    l->state = READY;
  }
  if (!waiting) return true;
  if (done) finding_of(waiting, EXITED_BARRIER, done);
  if (elsewhere) finding_of(waiting, DIVERGENT_BARRIER, elsewhere, elsewhere->pc);
  for (int space : {1, 2})
    if (flags & space) barrier_epoch[space] = ++last_epoch;
  return false;
}

static void run_threadgroup(uint32_t n) {
  start_threadgroup(n);
  do {
    std::vector<uint32_t> order(simdgroups.size());
    for (uint32_t i = 0; i < order.size(); i++) order[i] = i;
    permute(order);
    for (auto i : order) run_simdgroup(simdgroups[i]);
  } while (!release_barrier(n));
}

static void run_grid() {
  const uint32_t *grid = config.grid, *tg = config.threadgroup;
  uint32_t count[3];
  for (int k = 0; k < 3; k++) count[k] = (uint32_t)(((uint64_t)grid[k] + tg[k] - 1) / tg[k]);
  threadgroups_total = (uint64_t)count[0] * count[1] * count[2];
  uint64_t end = threadgroups_total;
  if (config.n_threadgroups) {
    end = std::min(end, config.first_threadgroup + config.n_threadgroups);
    threadgroups_done = config.first_threadgroup;
  }
  for (; threadgroups_done < end; threadgroups_done++) {
    uint64_t t = config.order == REVERSE ? threadgroups_total - 1 - threadgroups_done : threadgroups_done;
    uint32_t p[3] = {(uint32_t)(t % count[0]), (uint32_t)(t / count[0] % count[1]),
                     (uint32_t)(t / ((uint64_t)count[0] * count[1]))};
    uint32_t size[3];
    for (int k = 0; k < 3; k++) size[k] = std::min(tg[k], grid[k] - p[k] * tg[k]);
    uint32_t n = size[0] * size[1] * size[2];
    threadgroup_now = threadgroup_base + (uint32_t)t + 1;
    for (uint32_t i = 0; i < n; i++) {
      uint32_t x = i % size[0], y = i / size[0] % size[1], z = i / (size[0] * size[1]);
      lanes[i]->id = ThreadId{{p[0] * tg[0] + x, p[1] * tg[1] + y, p[2] * tg[2] + z},
                              {x, y, z},
                              {p[0], p[1], p[2]},
                              {grid[0], grid[1], grid[2]},
                              {size[0], size[1], size[2]},
                              {count[0], count[1], count[2]},
                              {tg[0], tg[1], tg[2]},
                              i,
                              i % 32,
                              i / 32,
                              (n + 31) / 32};
    }
    run_threadgroup(n);
  }
}
