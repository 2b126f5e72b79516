// <metal_type_traits> and <metal_limits>.
#pragma once

namespace metal {
using ::bfloat;
using ::vec;

template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
inline constexpr bool is_same_v = is_same<A, B>::value;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class U>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool B, class T, class U>
using conditional_t = typename conditional<B, T, U>::type;

template <class A, class B>
inline constexpr bool is_convertible_v = __is_convertible(A, B);
template <class T>
inline constexpr bool is_integral_v = __is_integral(T);
template <class T>
inline constexpr bool is_floating_point_v =
    __is_floating_point(T) || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
inline constexpr bool is_signed_v = __is_signed(T);
template <class T>
inline constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
inline constexpr bool is_arithmetic_v = __is_arithmetic(T) || is_floating_point_v<T>;
template <class T>
inline constexpr bool is_pointer_v = __is_pointer(T);

template <class A, class B>
struct is_convertible : bool_constant<is_convertible_v<A, B>> {};
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
struct is_pointer : bool_constant<is_pointer_v<T>> {};

template <class... B>
struct _disjunction : bool_constant<(false || ... || bool(B::value))> {};

// A promise to the compiler that all threads hold the same value.
template <class T>
using uniform = T;
template <class T>
MSL_FN constexpr T make_uniform(T value) {
  return value;
}

template <class T, size_t N>
struct array {
  T values[N];
  constexpr T operator[](size_t i) const { return values[i]; }
  constexpr T& operator[](size_t i) { return values[i]; }
  constexpr size_t size() const { return N; }
};

template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using decay_t = __decay(T);
template <class T>
using remove_addrspace_t = T;
template <class T>
struct remove_cv {
  using type = remove_cv_t<T>;
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using make_signed_t = __make_signed(T);

template <class T>
struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, LOW, HIGH)           \
  template <>                                      \
  struct numeric_limits<T> {                       \
    static constexpr bool is_signed = (LOW) != 0;  \
    static constexpr int digits = sizeof(T) * 8 - is_signed; \
    static constexpr T min() { return LOW; }       \
    static constexpr T lowest() { return LOW; }    \
    static constexpr T max() { return HIGH; }      \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(signed char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, UCHAR_MAX)
MSL_INTEGER_LIMITS(short, -32768, SHRT_MAX)
MSL_INTEGER_LIMITS(ushort, 0, USHRT_MAX)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, -LONG_MAX - 1, LONG_MAX)
MSL_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
#undef MSL_INTEGER_LIMITS

#define MSL_FLOAT_LIMITS(T, LARGEST, SMALLEST, EPSILON)                     \
  template <>                                                               \
  struct numeric_limits<T> {                                                \
    static constexpr bool is_signed = true;                                 \
    static constexpr T min() { return static_cast<T>(SMALLEST); }           \
    static constexpr T lowest() { return static_cast<T>(-LARGEST); }        \
    static constexpr T max() { return static_cast<T>(LARGEST); }            \
    static constexpr T epsilon() { return static_cast<T>(EPSILON); }        \
    static constexpr T infinity() { return static_cast<T>(__builtin_inff()); }  \
    static constexpr T quiet_NaN() { return static_cast<T>(__builtin_nanf("")); } \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-5f, 9.765625e-4f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, FLT_MIN, 0.0078125f)
#undef MSL_FLOAT_LIMITS
}  // namespace metal
