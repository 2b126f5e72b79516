// The functions that clang's instrumentation calls. Kernels are only *compiled* with
// -fsanitize=thread and -fsanitize=alignment,...: no sanitizer library is linked, this
// file takes its place.
#include <cstring>

#include "state.h"

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

#define MEMORY_HOOKS(SIZE)                                                      \
  void __tsan_read##SIZE(void* p) { check_access(p, SIZE, kRead, CALLER); }     \
  void __tsan_write##SIZE(void* p) { check_access(p, SIZE, kWrite, CALLER); }   \
  void __tsan_unaligned_read##SIZE(void* p) {                                   \
    check_access(p, SIZE, kRead, CALLER);                                       \
  }                                                                             \
  void __tsan_unaligned_write##SIZE(void* p) {                                  \
    check_access(p, SIZE, kWrite, CALLER);                                      \
  }                                                                             \
  void __tsan_read_write##SIZE(void* p) {                                       \
    check_access(p, SIZE, kRead | kWrite, CALLER);                              \
  }                                                                             \
  void __tsan_unaligned_read_write##SIZE(void* p) {                             \
    check_access(p, SIZE, kRead | kWrite, CALLER);                              \
  }

// Every handler gets the place in the source first.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

static void undefined(const SourceLocation* at, const char* what) {
  report("undefined", static_cast<int>(at->line), 0, 0, "%s", what);
}

#define UNDEFINED_1(NAME, WHAT) \
  void __ubsan_handle_##NAME(SourceLocation* at, void*) { undefined(at, WHAT); }
#define UNDEFINED_2(NAME, WHAT) \
  void __ubsan_handle_##NAME(SourceLocation* at, void*, void*) { undefined(at, WHAT); }

#pragma GCC visibility push(default)
extern "C" {

MEMORY_HOOKS(1)
MEMORY_HOOKS(2)
MEMORY_HOOKS(4)
MEMORY_HOOKS(8)
MEMORY_HOOKS(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_ignore_thread_begin() {}
void __tsan_ignore_thread_end() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void* __tsan_memcpy(void* to, const void* from, size_t size) {
  check_access(from, size, kRead, CALLER);
  check_access(to, size, kWrite, CALLER);
  return memcpy(to, from, size);
}

void* __tsan_memmove(void* to, const void* from, size_t size) {
  check_access(from, size, kRead, CALLER);
  check_access(to, size, kWrite, CALLER);
  return memmove(to, from, size);
}

void* __tsan_memset(void* to, int value, size_t size) {
  check_access(to, size, kWrite, CALLER);
  return memset(to, value, size);
}

UNDEFINED_1(type_mismatch_v1, "misaligned address for its type")
UNDEFINED_1(out_of_bounds, "index outside an array")
UNDEFINED_2(shift_out_of_bounds, "shift by more than the type's bits")
UNDEFINED_2(divrem_overflow, "integer division by zero or overflow")
UNDEFINED_2(add_overflow, "signed integer overflow in +")
UNDEFINED_2(sub_overflow, "signed integer overflow in -")
UNDEFINED_2(mul_overflow, "signed integer overflow in *")
UNDEFINED_1(negate_overflow, "signed integer overflow in -")
}
#pragma GCC visibility pop
