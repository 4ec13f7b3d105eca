// What an instrumented kernel calls: the shim's own functions, clang's thread-sanitizer and undefined-behaviour hooks.
#pragma once
#include <cstdarg>

#include "access.h"

#define RETURN_PC ((uint64_t)__builtin_return_address(0))

// ---- the shim's functions (msl_base.h) ----
extern "C" {
__attribute__((noinline)) void __msl_sync(uint32_t kind, const void* payload, uint32_t size, uint32_t arg) {
  Lane* l = current;
  l->kind = kind, l->arg = arg, l->pc = last_pc = RETURN_PC;
  stop_if_expired(l->pc);
  l->parity ^= 1;
  if (size) memcpy(l->slots[l->parity], payload, size > 64 ? 64 : size);
  l->state = WAITING;
  yield_lane();
}
const void* __msl_peek(uint32_t lane) {
  if (lane < 32 && (current->active >> lane) & 1) return simdgroups[current->simdgroup].view[lane];
  finding(DEAD_LANE, current->pc, 0, NO_REGION, lane);
  return poison;
}
uint32_t __msl_active() { return current->active; }
uint32_t __msl_lane() { return current->lane; }
void __msl_block(uint32_t id) { block_counts[id]++; }
void* __msl_tg_alloc(uint32_t id, uint32_t size, uint32_t align) {
  for (auto& v : variables)
    if (v.id == id) return arena + v.offset;
  if (align < 16) align = 16;
  uint32_t offset = (arena_top + align - 1) / align * align;
  arena_used = (arena_used + align - 1) / align * align + size;
  variables.push_back({id, offset, size});
  arena_top = offset + size + 256;  // nothing between variables, so that an index past the end is found
  if (arena_used > config.threadgroup_limit) finding(THREADGROUP_LIMIT, RETURN_PC, 0, NO_REGION, arena_used);
  if (arena_top > ARENA) stop_run();
  return arena + offset;
}
uint32_t __msl_atomic32(uint32_t op, void* p, uint32_t v, uint32_t expected) {
  if (config.check) on_access((uint64_t)p, 4, op != 0, true, RETURN_PC, 4);
  uint32_t& m = *(uint32_t*)p;
  uint32_t old = m;
  switch (op) {  // the enum of msl_atomic.h
    case 0:
      break;
    case 1:
    case 2:
      m = v;
      break;
    case 3:
      m += v;
      break;
    case 4:
      m -= v;
      break;
    case 5:
      m = (int32_t)v > (int32_t)m ? v : m;
      break;
    case 6:
      m = (int32_t)v < (int32_t)m ? v : m;
      break;
    case 7:
      m = std::max(m, v);
      break;
    case 8:
      m = std::min(m, v);
      break;
    case 9:
      m &= v;
      break;
    case 10:
      m |= v;
      break;
    case 11:
      m ^= v;
      break;
    case 12: {
      float a, b;
      memcpy(&a, &m, 4), memcpy(&b, &v, 4);
      a += b;
      memcpy(&m, &a, 4);
      break;
    }
    case 13:
      m = m == expected ? v : m;
      break;
  }
  return old;
}

// ---- thread sanitizer ----
#define READ(n, align) on_access((uint64_t)a, n, false, false, RETURN_PC, align)
#define WRITE(n, align) on_access((uint64_t)a, n, true, false, RETURN_PC, align)
#define HOOKS(n) \
  void __tsan_read##n(void* a) { READ(n, n > 8 ? 8 : n); } \
  void __tsan_write##n(void* a) { WRITE(n, n > 8 ? 8 : n); } \
  void __tsan_unaligned_read##n(void* a) { READ(n, 1); } \
  void __tsan_unaligned_write##n(void* a) { WRITE(n, 1); } \
  void __tsan_volatile_read##n(void* a) { READ(n, 1); } \
  void __tsan_volatile_write##n(void* a) { WRITE(n, 1); } \
  void __tsan_read_write##n(void* a) { READ(n, 1), WRITE(n, 1); } \
  void __tsan_unaligned_read_write##n(void* a) { READ(n, 1), WRITE(n, 1); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

    // Mode `count` (counting.py): the same with the place in the source and the width that the text asks for there.
    void __msl_access(void* a, uint32_t what, uint32_t place, uint32_t width) {
  uint32_t size = what & 255, alignment = what & 512 ? 1 : size > 8 ? 8 : size;
  on_access((uint64_t)a, size, what & 256, false, RETURN_PC, alignment, place, width);
}

static void on_range(uint64_t a, uint64_t n, bool write, uint64_t pc) {
  for (uint64_t i = 0; i < n; i += 16) on_access(a + i, (uint32_t)std::min<uint64_t>(16, n - i), write, false, pc, 1);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, uint64_t n) {
  on_range((uint64_t)from, n, false, RETURN_PC);
  on_range((uint64_t)to, n, true, RETURN_PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, uint64_t n) {
  on_range((uint64_t)from, n, false, RETURN_PC);
  on_range((uint64_t)to, n, true, RETURN_PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, uint64_t n) {
  on_range((uint64_t)to, n, true, RETURN_PC);
  return memset(to, value, n);
}

// ---- undefined behaviour: the source position comes with the data ----
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
static void on_undefined(const SourceLocation& l, const char* what, ...) {
  if (!current) return;
  char message[256], text[512];
  va_list args;
  va_start(args, what);
  vsnprintf(message, sizeof message, what, args);
  va_end(args);
  const char* name = l.file ? strrchr(l.file, '/') : nullptr;
  snprintf(text, sizeof text, "%s:%u: %s", name ? name + 1 : l.file ? l.file : "?", l.line, message);
  Finding& f = finding(UNDEFINED, (uint64_t)l.line << 20 | l.column);
  if (f.text.empty()) f.text = text;
}
#define UNDEFINED_HOOK(name, what) \
  void __ubsan_handle_##name(SourceLocation* l, uint64_t, uint64_t) { on_undefined(*l, what); }
UNDEFINED_HOOK(shift_out_of_bounds, "shift amount out of range")
UNDEFINED_HOOK(out_of_bounds, "index out of the array's bounds")
UNDEFINED_HOOK(divrem_overflow, "integer division by zero or overflow")
UNDEFINED_HOOK(add_overflow, "signed overflow in +")
UNDEFINED_HOOK(sub_overflow, "signed overflow in -")
UNDEFINED_HOOK(mul_overflow, "signed overflow in *")
UNDEFINED_HOOK(negate_overflow, "signed overflow in negation")
UNDEFINED_HOOK(float_cast_overflow, "float to integer conversion out of the integer's range")
UNDEFINED_HOOK(pointer_overflow, "pointer arithmetic overflow")
UNDEFINED_HOOK(load_invalid_value, "load of an invalid bool")
UNDEFINED_HOOK(builtin_unreachable, "unreachable reached")
void __ubsan_handle_type_mismatch_v1(SourceLocation* l, uint64_t) {
  uint8_t log_alignment = ((uint8_t*)l)[sizeof(SourceLocation) + 8];
  on_undefined(*l, "misaligned address for its type (needs %u)", 1u << log_alignment);
}
}
