// <metal_atomic>. Fibers give way only where they wait, so plain memory is atomic; the
// call of msl_atomic tells the race checker.
#pragma once

namespace metal {

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};

// What lies between its start and end counts as one atomic access. A guard object, not
// a function that is not checked: that one would be inlined, and then be checked.
struct msl_atomic_access {
  MSL_FN msl_atomic_access(const void* address, msl_size_t size, int kind) {
    msl_atomic_begin(address, size, kind);
  }
  MSL_FN ~msl_atomic_access() { msl_atomic_end(); }
};

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

#define MSL_FETCH(SPACE, NAME, EXPRESSION)                                          \
  template <class T, class V>                                                       \
  MSL_FN T atomic_fetch_##NAME##_explicit(SPACE atomic<T>* object, V operand,       \
                                          memory_order) {                           \
    const msl_atomic_access guard((const void*)object, sizeof(T), MSL_ATOMIC_RMW);   \
    const T old = object->value, given = static_cast<T>(operand);                   \
    object->value = static_cast<T>(EXPRESSION);                                     \
    return old;                                                                     \
  }

#define MSL_ATOMICS(SPACE)                                                          \
  template <class T>                                                                \
  MSL_FN T atomic_load_explicit(const SPACE atomic<T>* object, memory_order) {      \
    const msl_atomic_access guard((const void*)object, sizeof(T), MSL_ATOMIC_LOAD);   \
    return object->value;                                                           \
  }                                                                                 \
  template <class T, class V>                                                       \
  MSL_FN void atomic_store_explicit(SPACE atomic<T>* object, V desired,             \
                                    memory_order) {                                 \
    const msl_atomic_access guard((const void*)object, sizeof(T), MSL_ATOMIC_STORE);   \
    object->value = static_cast<T>(desired);                                        \
  }                                                                                 \
  template <class T, class V>                                                       \
  MSL_FN T atomic_exchange_explicit(SPACE atomic<T>* object, V desired,             \
                                    memory_order) {                                 \
    const msl_atomic_access guard((const void*)object, sizeof(T), MSL_ATOMIC_RMW);   \
    const T old = object->value;                                                    \
    object->value = static_cast<T>(desired);                                        \
    return old;                                                                     \
  }                                                                                 \
  template <class T, class V>                                                       \
  MSL_FN bool atomic_compare_exchange_weak_explicit(SPACE atomic<T>* object,        \
                                                    T* expected, V desired,         \
                                                    memory_order, memory_order) {   \
    const msl_atomic_access guard((const void*)object, sizeof(T), MSL_ATOMIC_RMW);   \
    const T old = object->value;                                                    \
    if (__builtin_memcmp(&old, expected, sizeof(T)) == 0) {                         \
      object->value = static_cast<T>(desired);                                      \
      return true;                                                                  \
    }                                                                               \
    *expected = old;                                                                \
    return false;                                                                   \
  }                                                                                 \
  MSL_FETCH(SPACE, add, old + given)                                                \
  MSL_FETCH(SPACE, sub, old - given)                                                \
  MSL_FETCH(SPACE, max, metal::max(old, given))                                     \
  MSL_FETCH(SPACE, min, metal::min(old, given))                                     \
  MSL_FETCH(SPACE, and, old & given)                                                \
  MSL_FETCH(SPACE, or, old | given)                                                 \
  MSL_FETCH(SPACE, xor, old ^ given)

#ifdef MSL_LINT
MSL_ATOMICS(__attribute__((address_space(1))))
MSL_ATOMICS(__attribute__((address_space(3))))
#else
MSL_ATOMICS()
#endif
#undef MSL_ATOMICS
#undef MSL_FETCH

// Orders nothing here: a kernel that counts on it between groups is reported as a race.
MSL_FN void atomic_thread_fence(mem_flags, memory_order = memory_order_seq_cst,
                                thread_scope = thread_scope_device) {}
}  // namespace metal
