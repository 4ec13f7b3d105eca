// What a SIMD-group's lanes load together: which accesses are one instruction, and how many lines it touches.
#pragma once
#include "state.h"

static void account(const Access** group, int n) {
  Site& s = sites[group[0]->pc];
  s.execs++, s.lanes += n;
  s.region = group[0]->region, s.write = group[0]->write, s.size = group[0]->size;
  uint64_t sectors[128];
  std::pair<uint64_t, uint64_t> spans[64];
  int m = 0;
  for (int i = 0; i < n; i++) {
    s.bytes += group[i]->size;
    spans[i] = {group[i]->address, group[i]->address + group[i]->size};
    for (uint64_t k = spans[i].first >> 5; k <= (spans[i].second - 1) >> 5 && m < 128; k++) sectors[m++] = k;
  }
  std::sort(sectors, sectors + m);
  m = (int)(std::unique(sectors, sectors + m) - sectors);
  s.lines32 += m;
  uint64_t last64 = ~0ull, last128 = ~0ull;
  for (int i = 0; i < m; i++) {
    if (sectors[i] >> 1 != last64) last64 = sectors[i] >> 1, s.lines64++;
    if (sectors[i] >> 2 != last128) last128 = sectors[i] >> 2, s.lines128++;
  }
  std::sort(spans, spans + n);
  uint64_t high = 0;
  for (int i = 0; i < n; i++) {
    uint64_t low = std::max(spans[i].first, high);
    if (spans[i].second > low) s.unique += spans[i].second - low, high = spans[i].second;
  }
}

static bool same_path(const std::vector<Lane*>& active) {
  const auto& first = active[0]->log;
  for (auto* l : active)
    if (l->log.size() != first.size()) return false;
  for (size_t i = 0; i < first.size(); i++)
    for (auto* l : active)
      if (l->log[i].pc != first[i].pc) return false;
  return true;
}

static void flush_log(SimdGroup& sg) {
  std::vector<Lane*> active;
  for (auto* l : sg.lanes)
    if (!l->log.empty()) active.push_back(l);
  if (active.empty()) return;
  if (same_path(active)) {
    const Access* group[32];
    for (size_t i = 0; i < active[0]->log.size(); i++) {
      for (size_t k = 0; k < active.size(); k++) group[k] = &active[k]->log[i];
      account(group, (int)active.size());
    }
  } else {  // lanes took different paths: the k-th execution of an instruction by each counts as one SIMD instruction
    std::map<std::pair<uint32_t, uint32_t>, std::vector<const Access*>> groups;
    for (auto* l : active) {
      std::unordered_map<uint32_t, uint32_t> times;
      for (auto& a : l->log) groups[{a.pc, times[a.pc]++}].push_back(&a);
    }
    for (auto& g : groups) account(g.second.data(), (int)g.second.size());
  }
  for (auto* l : active) logged -= l->log.size(), l->log.clear();
}
