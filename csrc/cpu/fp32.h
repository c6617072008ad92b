// The tile that dense layers, scores and attention share where products are made in fp32: of float elements everywhere, of
// bfloat16 where the processor has no products of its own for them.
#ifndef ATTS_CPU_FP32_H_
#define ATTS_CPU_FP32_H_

#include "cpu/vector.h"

namespace atts {
namespace {

// Sixteen elements as fp32, in kParts vectors V.
template <class T>
struct Sixteen;

// Sixteen bfloat16 lie in eight 32-bit words, and two instructions split them: a shift gives the even ones, a mask the odd
// ones. So a widened row holds, of every whole sixteen, the even elements and then the odd ones; the rest is in order.
template <>
struct Sixteen<uint16_t> {
  using V = F8;
  static constexpr int kParts = 2;
  ATTS_INLINE V part(const uint16_t* x, int i) {
    const U8 pairs = load<U8>(x);
    return (F8)(i == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  ATTS_INLINE V every(float value) { return all(value); }
  ATTS_INLINE int64_t place(int64_t i) { return i % 2 * 8 + i / 2; }  // of element i
};

#if defined(__AVX512F__)
typedef float F16 __attribute__((vector_size(64)));

template <>
struct Sixteen<float> {
  using V = F16;
  static constexpr int kParts = 1;
  ATTS_INLINE V part(const float* x, int) { return load<V>(x); }
  ATTS_INLINE V every(float value) { return (V)_mm512_set1_ps(value); }
  ATTS_INLINE int64_t place(int64_t i) { return i; }
};

ATTS_INLINE F16 fma(F16 a, F16 b, F16 c) { return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ATTS_INLINE F8 halves(F16 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
template <>
struct Sixteen<float> {
  using V = F8;
  static constexpr int kParts = 2;
  ATTS_INLINE V part(const float* x, int i) { return load<V>(x + 8 * i); }
  ATTS_INLINE V every(float value) { return all(value); }
  ATTS_INLINE int64_t place(int64_t i) { return i; }
};
#endif
ATTS_INLINE F8 halves(F8 v) { return v; }  // the sum of its halves where it is wider

// Rows of a tile of four columns: their sums fill the registers, beside a column's elements and a row's.
template <class T>
constexpr int kTileRows = sizeof(typename Sixteen<T>::V) == sizeof(F8) ? 3 : 6;

template <class T>
ATTS_INLINE void widen_row(const T* x, int64_t n, float scale, float* out) {
  using S = Sixteen<T>;
  constexpr int64_t kLanes = 16 / S::kParts;
  int64_t k = 0;
  for (; k + 16 <= n; k += 16)
    for (int i = 0; i < S::kParts; ++i) store(out + k + i * kLanes, S::part(x + k, i) * scale);
  for (; k < n; ++k) out[k] = load1(x + k) * scale;
}

// out[r * out_stride + c] = x[r] . columns[c]; x[r] starts at x + r * x_stride and is widened.
template <class T, int R, int C>
ATTS_INLINE void dot_tile(const float* x, int64_t x_stride, const T* const* columns, int64_t n, float* out,
                          int64_t out_stride) {
  using S = Sixteen<T>;
  using V = typename S::V;
  constexpr int64_t kLanes = 16 / S::kParts;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = V{};
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int i = 0; i < S::kParts; ++i) {
        const V own = S::part(columns[c] + k, i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][c] = fma(load<V>(x + r * x_stride + k + i * kLanes), own, sum[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* o = out + r * out_stride;
    if constexpr (C % 4 == 0) {
#pragma GCC unroll 2
      for (int c = 0; c < C; c += 4)
        sum_lanes_of_4(halves(sum[r][c]), halves(sum[r][c + 1]), halves(sum[r][c + 2]), halves(sum[r][c + 3]), o + c);
    } else {
      for (int c = 0; c < C; ++c) o[c] = sum_lanes(halves(sum[r][c]));
    }
    for (int64_t rest = k; rest < n; ++rest)
      for (int c = 0; c < C; ++c) o[c] += x[r * x_stride + rest] * load1(columns[c] + rest);
  }
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CPU_FP32_H_
