// Math, integer, common, geometric and relational functions.
//
// half and bfloat are computed in float and rounded once, integers through float, as in
// MSL's overload sets. One precision for metal::, metal::precise:: and metal::fast::.
#pragma once

namespace metal {

// The type that a function of T returns.
template <class T>
struct msl_result {
  using type = float;
};
template <>
struct msl_result<half> {
  using type = half;
};
#ifndef MSL_LINT
template <>
struct msl_result<bfloat> {  // MLX adds these overloads in its bf16_math.h
  using type = bfloat;
};
#endif
template <class T, int N>
struct msl_result<vec<T, N>> {
  using type = vec<T, N>;
};

// Applies `f`, float to float, to a number or to each component.
template <class T, class F>
MSL_FN typename msl_result<T>::type msl_map(T value, F f) {
  if constexpr (msl_parts<T>::count > 1) {
    using E = typename msl_parts<T>::component;
    T result;
    for (int i = 0; i < msl_parts<T>::count; i++) {
      result[i] = static_cast<E>(f(static_cast<float>(value[i])));
    }
    return result;
  } else {
    return static_cast<typename msl_result<T>::type>(f(static_cast<float>(value)));
  }
}

// The type of two arguments together.
template <class A, class B>
struct msl_common {
  using type = decltype(A() + B());
};
template <class A>
struct msl_common<A, A> {
  using type = A;
};
template <class T, int N, class B>
struct msl_common<vec<T, N>, B> {
  using type = vec<T, N>;
};
template <class T, int N, class A>
struct msl_common<A, vec<T, N>> {
  using type = vec<T, N>;
};
template <class T, int N>
struct msl_common<vec<T, N>, vec<T, N>> {
  using type = vec<T, N>;
};
template <class A, class B>
using msl_common_t = typename msl_common<A, B>::type;

// Component i of a vector, or the number itself.
template <class T>
MSL_FN auto msl_at(T value, int i) {
  if constexpr (msl_parts<T>::count > 1) {
    return value[i];
  } else {
    return value;
  }
}

// Applies `f` to two numbers of the common type, or to each pair of components.
template <class A, class B, class F>
MSL_FN msl_common_t<A, B> msl_map2(A a, B b, F f) {
  using T = msl_common_t<A, B>;
  using E = typename msl_parts<T>::component;
  if constexpr (msl_parts<T>::count > 1) {
    T result;
    for (int i = 0; i < msl_parts<T>::count; i++) {
      result[i] = static_cast<E>(f(static_cast<E>(msl_at(a, i)), static_cast<E>(msl_at(b, i))));
    }
    return result;
  } else {
    return static_cast<T>(f(static_cast<T>(a), static_cast<T>(b)));
  }
}

#define MSL_FUNCTION(NAME, EXPRESSION)                     \
  template <class T>                                       \
  MSL_FN typename msl_result<T>::type NAME(T value) {      \
    return msl_map(value, [](float x) -> float { return EXPRESSION; }); \
  }
#define MSL_FUNCTION_2(NAME, EXPRESSION)                                   \
  template <class A, class B>                                              \
  MSL_FN msl_common_t<A, B> NAME(A first, B second) {                      \
    return msl_map2(first, second, [](auto a, auto b) {                    \
      const float x = static_cast<float>(a), y = static_cast<float>(b);    \
      return EXPRESSION;                                                   \
    });                                                                    \
  }

#define MSL_FUNCTIONS                                          \
  MSL_FUNCTION(acos, __builtin_acosf(x))                       \
  MSL_FUNCTION(acosh, __builtin_acoshf(x))                     \
  MSL_FUNCTION(asin, __builtin_asinf(x))                       \
  MSL_FUNCTION(asinh, __builtin_asinhf(x))                     \
  MSL_FUNCTION(atan, __builtin_atanf(x))                       \
  MSL_FUNCTION(atanh, __builtin_atanhf(x))                     \
  MSL_FUNCTION(ceil, __builtin_ceilf(x))                       \
  MSL_FUNCTION(cos, __builtin_cosf(x))                         \
  MSL_FUNCTION(cosh, __builtin_coshf(x))                       \
  MSL_FUNCTION(cospi, __builtin_cosf(M_PI_F * x))              \
  MSL_FUNCTION(exp, __builtin_expf(x))                         \
  MSL_FUNCTION(exp2, __builtin_exp2f(x))                       \
  MSL_FUNCTION(exp10, __builtin_powf(10.0f, x))                \
  MSL_FUNCTION(fabs, __builtin_fabsf(x))                       \
  MSL_FUNCTION(floor, __builtin_floorf(x))                     \
  MSL_FUNCTION(fract, x - __builtin_floorf(x))                 \
  MSL_FUNCTION(log, __builtin_logf(x))                         \
  MSL_FUNCTION(log2, __builtin_log2f(x))                       \
  MSL_FUNCTION(log10, __builtin_log10f(x))                     \
  MSL_FUNCTION(rint, __builtin_nearbyintf(x))                  \
  MSL_FUNCTION(round, __builtin_roundf(x))                     \
  MSL_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))               \
  MSL_FUNCTION(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f) \
  MSL_FUNCTION(sin, __builtin_sinf(x))                         \
  MSL_FUNCTION(sinh, __builtin_sinhf(x))                       \
  MSL_FUNCTION(sinpi, __builtin_sinf(M_PI_F * x))              \
  MSL_FUNCTION(sqrt, __builtin_sqrtf(x))                       \
  MSL_FUNCTION(tan, __builtin_tanf(x))                         \
  MSL_FUNCTION(tanh, __builtin_tanhf(x))                       \
  MSL_FUNCTION(trunc, __builtin_truncf(x))                     \
  MSL_FUNCTION_2(atan2, __builtin_atan2f(x, y))                \
  MSL_FUNCTION_2(copysign, __builtin_copysignf(x, y))          \
  MSL_FUNCTION_2(divide, x / y)                                \
  MSL_FUNCTION_2(fmod, __builtin_fmodf(x, y))                  \
  MSL_FUNCTION_2(pow, __builtin_powf(x, y))                    \
  MSL_FUNCTION_2(powr, __builtin_powf(x, y))

MSL_FUNCTIONS
namespace precise {
MSL_FUNCTIONS
}
namespace fast {
MSL_FUNCTIONS
}

#undef MSL_FUNCTIONS
#undef MSL_FUNCTION_2
#undef MSL_FUNCTION

template <class T>
MSL_FN T abs(T value) {
  if constexpr (is_floating_point_v<typename msl_parts<T>::component>) {
    return static_cast<T>(metal::fabs(value));
  } else if constexpr (msl_parts<T>::count > 1) {
    return value < 0 ? -value : value;
  } else {
    return value < 0 ? static_cast<T>(-value) : value;
  }
}

// Where one of two numbers is a NaN, MSL gives the other one.
template <class A, class B>
MSL_FN msl_common_t<A, B> max(A a, B b) {
  return msl_map2(a, b, [](auto x, auto y) {
    if (x != x) return y;
    if (y != y) return x;
    return x < y ? y : x;
  });
}
template <class A, class B>
MSL_FN msl_common_t<A, B> min(A a, B b) {
  return msl_map2(a, b, [](auto x, auto y) {
    if (x != x) return y;
    if (y != y) return x;
    return y < x ? y : x;
  });
}
template <class A, class B, class C>
MSL_FN A max3(A a, B b, C c) {
  return metal::max(a, metal::max(b, c));
}
template <class A, class B, class C>
MSL_FN A min3(A a, B b, C c) {
  return metal::min(a, metal::min(b, c));
}
template <class A, class B>
MSL_FN msl_common_t<A, B> fmax(A a, B b) {
  return metal::max(a, b);
}
template <class A, class B>
MSL_FN msl_common_t<A, B> fmin(A a, B b) {
  return metal::min(a, b);
}
template <class A, class B, class C>
MSL_FN A clamp(A value, B low, C high) {
  return static_cast<A>(metal::min(metal::max(value, static_cast<A>(low)), static_cast<A>(high)));
}

template <class T>
MSL_FN T fma(T a, T b, T c) {
  if constexpr (msl_parts<T>::count > 1) {
    T result;
    for (int i = 0; i < msl_parts<T>::count; i++) result[i] = metal::fma(a[i], b[i], c[i]);
    return result;
  } else {
    return static_cast<T>(__builtin_fmaf(static_cast<float>(a), static_cast<float>(b),
                                         static_cast<float>(c)));
  }
}
MSL_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <class T, class U>
MSL_FN T mix(T a, T b, U t) {
  return static_cast<T>(a + (b - a) * static_cast<T>(t));
}
template <class T>
MSL_FN T sign(T value) {
  return static_cast<T>(msl_map(
      value, [](float x) -> float { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x * 0.0f; }));
}
template <class T>
MSL_FN T step(T edge, T value) {
  return msl_map2(edge, value, [](auto e, auto x) { return x < e ? 0.0f : 1.0f; });
}
template <class T>
MSL_FN T smoothstep(T low, T high, T value) {
  const T t = metal::clamp((value - low) / (high - low), static_cast<T>(0), static_cast<T>(1));
  return static_cast<T>(t * t * (static_cast<T>(3) - static_cast<T>(2) * t));
}
template <class T, class C>
MSL_FN T select(T if_false, T if_true, C condition) {
  if constexpr (msl_parts<T>::count > 1) {
    T result;
    for (int i = 0; i < msl_parts<T>::count; i++) {
      result[i] = condition[i] ? if_true[i] : if_false[i];
    }
    return result;
  } else {
    return condition ? if_true : if_false;
  }
}
template <class T>
MSL_FN T ldexp(T value, int exponent) {
  return static_cast<T>(__builtin_ldexpf(static_cast<float>(value), exponent));
}

template <class T>
MSL_FN bool isnan(T value) {
  return static_cast<float>(value) != static_cast<float>(value);
}
template <class T>
MSL_FN bool isinf(T value) {
  return __builtin_fabsf(static_cast<float>(value)) == __builtin_inff();
}
template <class T>
MSL_FN bool isfinite(T value) {
  return __builtin_fabsf(static_cast<float>(value)) < __builtin_inff();
}
template <class T>
MSL_FN bool signbit(T value) {
  return __builtin_signbit(static_cast<float>(value));
}

template <class T>
MSL_FN T popcount(T value) {
  return static_cast<T>(__builtin_popcountl(static_cast<make_unsigned_t<T>>(value)));
}
template <class T>
MSL_FN T clz(T value) {
  const ulong bits = static_cast<make_unsigned_t<T>>(value);
  const int unused = 64 - static_cast<int>(sizeof(T)) * 8;
  return static_cast<T>(bits ? __builtin_clzl(bits) - unused : 64 - unused);
}
template <class T>
MSL_FN T ctz(T value) {
  const ulong bits = static_cast<make_unsigned_t<T>>(value);
  return static_cast<T>(bits ? __builtin_ctzl(bits) : static_cast<int>(sizeof(T)) * 8);
}
template <class T>
MSL_FN T reverse_bits(T value) {
  T result = 0;
  for (uint i = 0; i < sizeof(T) * 8; i++) {
    result = static_cast<T>((result << 1) | ((value >> i) & 1));
  }
  return result;
}
template <class T>
MSL_FN T rotate(T value, T by) {
  constexpr uint bits = sizeof(T) * 8;
  const uint left = static_cast<uint>(by) % bits;
  const auto all = static_cast<make_unsigned_t<T>>(value);
  return static_cast<T>(left ? (all << left) | (all >> (bits - left)) : all);
}
MSL_FN uint mulhi(uint a, uint b) { return static_cast<uint>((static_cast<ulong>(a) * b) >> 32); }
MSL_FN int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
MSL_FN uint extract_bits(uint value, uint offset, uint count) {
  return count == 32 ? value >> offset : (value >> offset) & ((1u << count) - 1);
}

template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N>
MSL_FN T length_squared(vec<T, N> a) {
  return metal::dot(a, a);
}
template <class T, int N>
MSL_FN T length(vec<T, N> a) {
  return static_cast<T>(__builtin_sqrtf(static_cast<float>(metal::dot(a, a))));
}
template <class T, int N>
MSL_FN T distance(vec<T, N> a, vec<T, N> b) {
  return metal::length(a - b);
}
template <class T, int N>
MSL_FN vec<T, N> normalize(vec<T, N> a) {
  return a / metal::length(a);
}
template <class V>
MSL_FN bool any(V value) {
  bool found = false;
  for (int i = 0; i < msl_parts<V>::count; i++) found = found || msl_at(value, i);
  return found;
}
template <class V>
MSL_FN bool all(V value) {
  bool every = true;
  for (int i = 0; i < msl_parts<V>::count; i++) every = every && msl_at(value, i);
  return every;
}
}  // namespace metal
