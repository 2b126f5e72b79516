// Switching between stacks: one fiber per GPU thread.
//
// Assembly for x86-64 and arm64, because swapcontext makes two system calls a switch
// (about 10x slower) and macOS has deprecated it. ucontext everywhere else.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(__aarch64__)
#define MSL_ASSEMBLY_SWITCH 1
#else
#include <ucontext.h>
#endif

struct Context {
#ifdef MSL_ASSEMBLY_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

#ifdef MSL_ASSEMBLY_SWITCH

#ifdef __APPLE__
#define MSL_SYMBOL "_msl_switch_stack"
#else
#define MSL_SYMBOL "msl_switch_stack"
#endif

// void msl_switch_stack(void** save, void* load): pushes what a function must preserve,
// stores the stack pointer, takes the other one, and pops.
extern "C" void msl_switch_stack(void** save, void* load);

#if defined(__x86_64__)
constexpr size_t kSavedWords = 6;
__asm__(
    ".text\n"
    ".globl " MSL_SYMBOL "\n"
    MSL_SYMBOL ":\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  retq\n");
#else
constexpr size_t kSavedWords = 20;
constexpr size_t kLinkRegister = 11;  // where x30 stands among the saved words
__asm__(
    ".text\n"
    ".p2align 2\n"
    ".globl " MSL_SYMBOL "\n"
    MSL_SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

inline void switch_context(Context& from, Context& to) {
  msl_switch_stack(&from.stack_pointer, to.stack_pointer);
}

// Makes the next switch to `context` call `entry`, which must never return.
inline void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);  // 16-byte aligned
#if defined(__x86_64__)
  *--top = nullptr;  // where a caller's return address would be: keeps the alignment
  *--top = reinterpret_cast<void*>(entry);
  for (size_t i = 0; i < kSavedWords; i++) *--top = nullptr;
#else
  for (size_t i = 0; i < kSavedWords; i++) *--top = nullptr;
  top[kLinkRegister] = reinterpret_cast<void*>(entry);
#endif
  context.stack_pointer = top;
}

#else  // ucontext

inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

inline void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif
