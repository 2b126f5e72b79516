// Instead of MLX's file, whose constructors are overloaded by address space. Arithmetic
// only: what a kernel over complex64 usually needs.
#pragma once
#include <metal_stdlib>

template <typename T>
struct complex_t {
  T real;
  T imag;

  constexpr complex_t(T real = 0, T imag = 0) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;

template <typename T>
constexpr bool operator==(complex_t<T> a, complex_t<T> b) {
  return a.real == b.real && a.imag == b.imag;
}
template <typename T>
constexpr bool operator>(complex_t<T> a, complex_t<T> b) {
  return a.real > b.real || (a.real == b.real && a.imag > b.imag);
}
template <typename T>
constexpr bool operator<(complex_t<T> a, complex_t<T> b) {
  return b > a;
}
template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a) {
  return {-a.real, -a.imag};
}
template <typename T>
constexpr complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}
template <typename T>
constexpr complex_t<T> operator-(complex_t<T> a, complex_t<T> b) {
  return {a.real - b.real, a.imag - b.imag};
}
template <typename T>
constexpr complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
