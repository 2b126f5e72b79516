// float4 and its kin: clang's vectors, which have MSL's swizzles.
#pragma once

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// packed_float3 and so on: aligned as one component.
template <typename T, int N>
struct msl_packed {
  T v[N];

  msl_packed() = default;
  template <class... A, class = decltype((T(A()), ...))>
  constexpr msl_packed(A... values) : v{static_cast<T>(values)...} {}
  constexpr msl_packed(vec<T, N> values) {
    for (int i = 0; i < N; i++) v[i] = values[i];
  }
  operator vec<T, N>() const {
    vec<T, N> all;
    for (int i = 0; i < N; i++) all[i] = v[i];
    return all;
  }
  T operator[](int i) const { return v[i]; }
  T& operator[](int i) { return v[i]; }
};

// What a value is made of: msl_parts<float4>::component is float, ::count is 4.
template <class T>
struct msl_parts {
  using component = T;
  static constexpr int count = 1;
};
template <class T, int N>
struct msl_parts<vec<T, N>> {
  using component = T;
  static constexpr int count = N;
};

template <class T, int N, class A>
MSL_FN void msl_append(T (&all)[N], int& filled, A value) {
  if constexpr (msl_parts<A>::count == 1) {
    all[filled++] = static_cast<T>(value);
  } else {
    for (int i = 0; i < msl_parts<A>::count; i++) all[filled++] = static_cast<T>(value[i]);
  }
}

// float4(a, b.xy, c). C++ has no such constructor: rewrite.py turns it into a call.
template <class V, class... A>
MSL_FN V msl_make(A... values) {
  using T = typename msl_parts<V>::component;
  constexpr int N = msl_parts<V>::count;
  if constexpr (N == 1) {
    return V(values...);
  } else {
    V result;
    constexpr int given = (0 + ... + msl_parts<A>::count);
    if constexpr (given == 0) {
      for (int i = 0; i < N; i++) result[i] = static_cast<T>(0);
    } else if constexpr (given == 1) {
      for (int i = 0; i < N; i++) result[i] = static_cast<T>((values, ...));
    } else {
      static_assert(given == N, "a vector gets one value or one for each component");
      T all[N];
      int filled = 0;
      (msl_append(all, filled, values), ...);
      for (int i = 0; i < N; i++) result[i] = all[i];
    }
    return result;
  }
}

#define MSL_VECTORS(T)                \
  typedef vec<T, 2> T##2;             \
  typedef vec<T, 3> T##3;             \
  typedef vec<T, 4> T##4;             \
  typedef msl_packed<T, 2> packed_##T##2; \
  typedef msl_packed<T, 3> packed_##T##3; \
  typedef msl_packed<T, 4> packed_##T##4;
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(float)
#undef MSL_VECTORS

// What clang's vector comparisons give.
typedef vec<int, 2> bool2;
typedef vec<int, 3> bool3;
typedef vec<int, 4> bool4;

template <class T, class U>
MSL_FN constexpr T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different size");
  return __builtin_bit_cast(T, value);
}
