// What is done row by row between and behind dense layers: one pass each, fp32 inside.
#include "cpu/kernels.h"
#include "cpu/table.h"
#include "cpu/vector.h"

namespace atts {
namespace ATTS_ISA {

void rms_norm(const atts_rms_norm_params& p, int64_t first, int64_t last) {
  const int64_t whole = p.width / 8 * 8;
  for (int64_t row = first; row < last; ++row) {
    const uint16_t* x = p.x + row * p.x_stride;
    uint16_t* out = p.out + row * p.width;
    if (p.delta != nullptr) {
      const uint16_t* delta = p.delta + row * p.width;
      uint16_t* sum = p.sum + row * p.width;
      for (int64_t i = 0; i < whole; i += 8)
        store(sum + i, to_bf16(from_bf16(load<H8>(x + i)) + from_bf16(load<H8>(delta + i))));
      for (int64_t i = whole; i < p.width; ++i) sum[i] = to_bf16(from_bf16(x[i]) + from_bf16(delta[i]));
      x = sum;
    }
    F8 squares = all(0.0f);
    for (int64_t i = 0; i < whole; i += 8) {
      const F8 v = from_bf16(load<H8>(x + i));
      squares = fma(v, v, squares);
    }
    float total = sum_lanes(squares);
    for (int64_t i = whole; i < p.width; ++i) total += from_bf16(x[i]) * from_bf16(x[i]);
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(p.width) + p.eps);
    // Rounded before the weight and after it, as the models were trained.
    for (int64_t i = 0; i < whole; i += 8) {
      const F8 normed = from_bf16(to_bf16(from_bf16(load<H8>(x + i)) * scale));
      store(out + i, to_bf16(normed * from_bf16(load<H8>(p.weight + i))));
    }
    for (int64_t i = whole; i < p.width; ++i)
      out[i] = to_bf16(from_bf16(to_bf16(from_bf16(x[i]) * scale)) * from_bf16(p.weight[i]));
  }
}

void silu_mul(const atts_silu_mul_params& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const uint16_t* gate = p.gate + row * p.gate_stride;
    const uint16_t* up = p.up + row * p.up_stride;
    uint16_t* out = p.out + row * p.width;
    int64_t i = 0;
    for (; i + 8 <= p.width; i += 8) {
      const F8 g = from_bf16(load<H8>(gate + i));
      store(out + i, to_bf16(g / (exp8(-g) + 1.0f) * from_bf16(load<H8>(up + i))));
    }
    for (; i < p.width; ++i) {
      const F8 g = all(from_bf16(gate[i]));
      out[i] = to_bf16((g / (exp8(-g) + 1.0f) * from_bf16(up[i]))[0]);
    }
  }
}

void rope(const atts_rope_params& p, int64_t first, int64_t last) {
  const int64_t half = p.head_dim / 2, whole = half / 8 * 8;
  for (int64_t row = first; row < last; ++row) {
    const float* cosine = p.cosine + row * half;
    const float* sine = p.sine + row * half;
    for (int64_t head = 0; head < p.heads; ++head) {
      const uint16_t* low = p.x + row * p.row_stride + head * p.head_dim;
      const uint16_t* high = low + half;
      uint16_t* out = p.out + (row * p.heads + head) * p.head_dim;
      for (int64_t i = 0; i < whole; i += 8) {
        const F8 a = from_bf16(load<H8>(low + i)), b = from_bf16(load<H8>(high + i));
        const F8 c = load<F8>(cosine + i), s = load<F8>(sine + i);
        store(out + i, to_bf16(a * c - b * s));
        store(out + half + i, to_bf16(b * c + a * s));
      }
      for (int64_t i = whole; i < half; ++i) {
        const float a = from_bf16(low[i]), b = from_bf16(high[i]);
        out[i] = to_bf16(a * cosine[i] - b * sine[i]);
        out[half + i] = to_bf16(b * cosine[i] + a * sine[i]);
      }
    }
  }
}

void narrow(const float* sum, const uint16_t* bias, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F8 value = load<F8>(sum + i);
    store(out + i, to_bf16(bias == nullptr ? value : value + from_bf16(load<H8>(bias + i))));
  }
  for (; i < n; ++i) out[i] = to_bf16(bias == nullptr ? sum[i] : sum[i] + from_bf16(bias[i]));
}

void widen(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(out + i, from_bf16(load<H8>(x + i)));
  for (; i < n; ++i) out[i] = from_bf16(x[i]);
}

void softmax_parts(float* values, int64_t n, float* largest, float* sum) {
  for (int64_t i = n; i < (n + 7) / 8 * 8; ++i) values[i] = -__builtin_inff();
  F8 peaks = load<F8>(values);
  for (int64_t i = 8; i < n; i += 8) {
    const F8 v = load<F8>(values + i);
    peaks = select(v > peaks, v, peaks);
  }
  float peak = peaks[0];
  for (int lane = 1; lane < 8; ++lane) peak = peaks[lane] > peak ? peaks[lane] : peak;
  F8 total = all(0.0f);
  for (int64_t i = 0; i < n; i += 8) {
    const F8 e = exp8(load<F8>(values + i) - peak);
    store(values + i, e);
    total += e;
  }
  *largest = peak;
  *sum = sum_lanes(total);
}

}  // namespace ATTS_ISA
}  // namespace atts
