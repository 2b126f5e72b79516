// 8x8 simdgroup matrices. Each lane owns two neighbouring elements of a row, at the
// places that MLX's own matrix code counts on.
#pragma once

namespace metal {

MSL_FN void msl_element(int lane, int& row, int& column) {
  const int quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}

template <class T, int Columns = 8, int Rows = 8>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "only 8x8");
  vec<float, 2> elements;  // computed in float, rounded to T when stored

  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {
    int row, column;
    msl_element(static_cast<int>(msl_thread()->thread_index_in_simdgroup), row, column);
    for (int k = 0; k < 2; k++) {
      elements[k] = row == column + k ? static_cast<float>(diagonal) : 0.0f;
    }
  }
  vec<float, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.elements = vec<float, 2>{static_cast<float>(value), static_cast<float>(value)};
  return result;
}

struct msl_product_frame {
  vec<float, 2> a, b, c, out;
};

MSL_FN void msl_multiply(void** all) {
  msl_product_frame** frames = reinterpret_cast<msl_product_frame**>(all);
  float a[8][8] = {}, b[8][8] = {};
  int row, column;
  for (int lane = 0; lane < 32; lane++) {
    if (!frames[lane]) {
      msl_report_lane("a matrix product needs all 32 lanes");
      continue;
    }
    msl_element(lane, row, column);
    for (int k = 0; k < 2; k++) {
      a[row][column + k] = frames[lane]->a[k];
      b[row][column + k] = frames[lane]->b[k];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    if (!frames[lane]) continue;
    msl_element(lane, row, column);
    for (int k = 0; k < 2; k++) {
      float sum = frames[lane]->c[k];
      for (int j = 0; j < 8; j++) sum += a[row][j] * b[j][column + k];
      frames[lane]->out[k] = sum;
    }
  }
}

template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(D& result, A& a, B& b, C& c, MSL_HERE) {
  msl_product_frame frame{a.elements, b.elements, c.elements, {}};
  msl_simd(line_, column_, "simdgroup_multiply_accumulate", &frame,
           [](void** all) { msl_multiply(all); });
  result.elements = frame.out;
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(D& result, A& a, B& b, MSL_HERE) {
  msl_product_frame frame{a.elements, b.elements, vec<float, 2>{0.0f, 0.0f}, {}};
  msl_simd(line_, column_, "simdgroup_multiply", &frame,
           [](void** all) { msl_multiply(all); });
  result.elements = frame.out;
}

MSL_FN ulong msl_matrix_index(int row, int column, ulong per_row, vec<ulong, 2> origin,
                              bool transpose) {
  return transpose ? (origin[1] + static_cast<ulong>(column)) * per_row + origin[0] + row
                   : (origin[1] + static_cast<ulong>(row)) * per_row + origin[0] + column;
}

template <class T, class P>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T>& matrix, P source, ulong per_row = 8,
                               vec<ulong, 2> origin = vec<ulong, 2>{0, 0},
                               bool transpose = false) {
  int row, column;
  msl_element(static_cast<int>(msl_thread()->thread_index_in_simdgroup), row, column);
  for (int k = 0; k < 2; k++) {
    const ulong at = msl_matrix_index(row, column + k, per_row, origin, transpose);
    matrix.elements[k] = static_cast<float>(source[at]);
  }
}
template <class T, class P>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T> matrix, P target, ulong per_row = 8,
                                vec<ulong, 2> origin = vec<ulong, 2>{0, 0},
                                bool transpose = false) {
  int row, column;
  msl_element(static_cast<int>(msl_thread()->thread_index_in_simdgroup), row, column);
  for (int k = 0; k < 2; k++) {
    const ulong at = msl_matrix_index(row, column + k, per_row, origin, transpose);
    target[at] = static_cast<T>(matrix.elements[k]);
  }
}
}  // namespace metal
