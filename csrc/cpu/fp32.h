// The tile that dense layers, scores and attention share.
#ifndef ATTS_CPU_FP32_H_
#define ATTS_CPU_FP32_H_

#include "cpu/vector.h"

namespace atts {
namespace {

// Sixteen bfloat16 lie in eight 32-bit words, and two instructions split them: a shift gives the even ones, a mask the odd
// ones. So a widened row holds, of every whole sixteen, the even elements and then the odd ones; the rest is in order.
ATTS_INLINE void widen_row(const uint16_t* x, int64_t n, float scale, float* out) {
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
    const U8 pairs = load<U8>(x + k);
    store(out + k, (F8)(pairs << 16) * scale);
    store(out + k + 8, (F8)(pairs & 0xffff0000u) * scale);
  }
  for (; k < n; ++k) out[k] = from_bf16(x[k]) * scale;
}

// out[r * out_stride + c] = x[r] . columns[c]; x[r] starts at x + r * x_stride and is widened.
template <int R, int C>
ATTS_INLINE void dot_tile(const float* x, int64_t x_stride, const uint16_t* const* columns, int64_t n, float* out,
                          int64_t out_stride) {
  F8 sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = all(0.0f);
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const U8 pairs = load<U8>(columns[c] + k);
      const F8 even = (F8)(pairs << 16), odd = (F8)(pairs & 0xffff0000u);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r][c] = fma(load<F8>(x + r * x_stride + k), even, sum[r][c]);
        sum[r][c] = fma(load<F8>(x + r * x_stride + k + 8), odd, sum[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* o = out + r * out_stride;
    if constexpr (C % 4 == 0) {
#pragma GCC unroll 2
      for (int c = 0; c < C; c += 4) sum_lanes_of_4(sum[r][c], sum[r][c + 1], sum[r][c + 2], sum[r][c + 3], o + c);
    } else {
      for (int c = 0; c < C; ++c) o[c] = sum_lanes(sum[r][c]);
    }
    for (int64_t rest = k; rest < n; ++rest)
      for (int c = 0; c < C; ++c) o[c] += x[r * x_stride + rest] * from_bf16(columns[c][rest]);
  }
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CPU_FP32_H_
