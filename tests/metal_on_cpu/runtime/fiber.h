// A GPU thread is a fiber: a stack of its own, and a switch that saves what a call must keep.
#pragma once
#include "state.h"

extern "C" void msl_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
msl_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 retq
)");
static void* new_stack(uint8_t* top, void (*f)()) {
  void** p = (void**)(((uintptr_t)top & ~15ull) - 16);
  *p = (void*)f;
  for (int i = 0; i < 6; i++) *--p = nullptr;
  return p;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
msl_switch:
 sub sp,sp,#160
 stp x19,x20,[sp]
 stp x21,x22,[sp,#16]
 stp x23,x24,[sp,#32]
 stp x25,x26,[sp,#48]
 stp x27,x28,[sp,#64]
 stp x29,x30,[sp,#80]
 stp d8,d9,[sp,#96]
 stp d10,d11,[sp,#112]
 stp d12,d13,[sp,#128]
 stp d14,d15,[sp,#144]
 mov x9,sp
 str x9,[x0]
 mov sp,x1
 ldp x19,x20,[sp]
 ldp x21,x22,[sp,#16]
 ldp x23,x24,[sp,#32]
 ldp x25,x26,[sp,#48]
 ldp x27,x28,[sp,#64]
 ldp x29,x30,[sp,#80]
 ldp d8,d9,[sp,#96]
 ldp d10,d11,[sp,#112]
 ldp d12,d13,[sp,#128]
 ldp d14,d15,[sp,#144]
 add sp,sp,#160
 ret
)");
static void* new_stack(uint8_t* top, void (*f)()) {
  uint8_t* p = (uint8_t*)((uintptr_t)top & ~15ull) - 160;
  memset(p, 0, 160);
  *(void**)(p + 88) = (void*)f;
  return p;
}
#else
#error "no fiber switch for this CPU"
#endif

static void settle_pending_write();

static void yield_lane() {
  Lane* l = current;
  switches++;
  settle_pending_write();
  msl_switch(&l->sp, scheduler_sp);
}

static void fiber_main() {
  entry(kernel_arguments.data(), &current->id);
  current->state = DONE;
  yield_lane();
  __builtin_trap();
}

static void resume(Lane* l) {
  current = l;
  msl_switch(&scheduler_sp, l->sp);
  current = nullptr;
}

// Mapped once for the process, each above a guard that catches a lane's overflow.
static void map_stacks() {
  if (!stacks.empty()) return;
  size_t each = GUARD + STACK;
  uint8_t* m = (uint8_t*)mmap(nullptr, each * MAX_THREADS, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (uint32_t i = 0; i < MAX_THREADS; i++) {
    mprotect(m + i * each, GUARD, PROT_NONE);
    stacks.push_back(m + i * each + GUARD);
    lanes.push_back(new Lane());
  }
}
