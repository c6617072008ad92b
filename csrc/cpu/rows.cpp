// Ops that take a row at a time: fp32 inside, an element's type outside.
#include "cpu/kernels.h"
#include "cpu/table.h"
#include "cpu/vector.h"

namespace atts {
namespace ATTS_ISA {
namespace {

template <class T>
void rms_norm(const atts_rms_norm_params& p, int64_t first, int64_t last) {
  const int64_t whole = p.width / 8 * 8;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.width;
    if (p.delta != nullptr) {
      const T* delta = static_cast<const T*>(p.delta) + row * p.width;
      T* sum = static_cast<T*>(p.sum) + row * p.width;
      for (int64_t i = 0; i < whole; i += 8) store8(sum + i, load8(x + i) + load8(delta + i));
      for (int64_t i = whole; i < p.width; ++i) store1(sum + i, load1(x + i) + load1(delta + i));
      x = sum;
    }
    F8 squares = all(0.0f);
    for (int64_t i = 0; i < whole; i += 8) {
      const F8 v = load8(x + i);
      squares = fma(v, v, squares);
    }
    float total = sum_lanes(squares);
    for (int64_t i = whole; i < p.width; ++i) total += load1(x + i) * load1(x + i);
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(p.width) + p.eps);
    // Rounded before the weight and after it, as the models were trained.
    for (int64_t i = 0; i < whole; i += 8) store8(out + i, rounded<T>(load8(x + i) * scale) * load8(weight + i));
    for (int64_t i = whole; i < p.width; ++i)
      store1(out + i, rounded<T>(all(load1(x + i) * scale))[0] * load1(weight + i));
  }
}

template <class T>
void silu_mul(const atts_silu_mul_params& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.width;
    int64_t i = 0;
    for (; i + 8 <= p.width; i += 8) {
      const F8 g = load8(gate + i);
      store8(out + i, g / (exp8(-g) + 1.0f) * load8(up + i));
    }
    for (; i < p.width; ++i) {
      const F8 g = all(load1(gate + i));
      store1(out + i, (g / (exp8(-g) + 1.0f) * load1(up + i))[0]);
    }
  }
}

template <class T>
void rope(const atts_rope_params& p, int64_t first, int64_t last) {
  const int64_t half = p.head_dim / 2, whole = half / 8 * 8;
  for (int64_t row = first; row < last; ++row) {
    const float* cosine = p.cosine + row * half;
    const float* sine = p.sine + row * half;
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* low = static_cast<const T*>(p.x) + row * p.row_stride + head * p.head_dim;
      const T* high = low + half;
      T* out = static_cast<T*>(p.out) + (row * p.heads + head) * p.head_dim;
      for (int64_t i = 0; i < whole; i += 8) {
        const F8 a = load8(low + i), b = load8(high + i);
        const F8 c = load<F8>(cosine + i), s = load<F8>(sine + i);
        store8(out + i, a * c - b * s);
        store8(out + half + i, b * c + a * s);
      }
      for (int64_t i = whole; i < half; ++i) {
        const float a = load1(low + i), b = load1(high + i);
        store1(out + i, a * cosine[i] - b * sine[i]);
        store1(out + half + i, b * cosine[i] + a * sine[i]);
      }
    }
  }
}

template <class T>
void narrow(const float* sum, const T* bias, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F8 value = load<F8>(sum + i);
    store8(out + i, bias == nullptr ? value : value + load8(bias + i));
  }
  for (; i < n; ++i) store1(out + i, bias == nullptr ? sum[i] : sum[i] + load1(bias + i));
}

}  // namespace

#define ATTS_DEFINE_ROWS(name, T)                                                                                      \
  void rms_norm_##name(const atts_rms_norm_params& p, int64_t first, int64_t last) { rms_norm<T>(p, first, last); }    \
  void silu_mul_##name(const atts_silu_mul_params& p, int64_t first, int64_t last) { silu_mul<T>(p, first, last); }    \
  void rope_##name(const atts_rope_params& p, int64_t first, int64_t last) { rope<T>(p, first, last); }                \
  void narrow_##name(const float* sum, const T* bias, int64_t n, T* out) { narrow<T>(sum, bias, n, out); }

ATTS_DEFINE_ROWS(bf16, uint16_t)
ATTS_DEFINE_ROWS(fp32, float)

void widen(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(out + i, load8(x + i));
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
