// Eight lanes of fp32. Everything here has internal linkage: what two instruction sets compile must not be merged.
#ifndef ATTS_CPU_VECTOR_H_
#define ATTS_CPU_VECTOR_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ATTS_INLINE static inline __attribute__((always_inline))

namespace atts {
namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

template <class V, class T>
ATTS_INLINE V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
ATTS_INLINE void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

ATTS_INLINE F8 all(float value) { return F8{value, value, value, value, value, value, value, value}; }

ATTS_INLINE F8 fma(F8 a, F8 b, F8 c) {
#if defined(__FMA__)
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

ATTS_INLINE F8 select(I8 mask, F8 yes, F8 no) { return (F8)(((I8)yes & mask) | ((I8)no & ~mask)); }

// One order for every instruction set: neighbours, then pairs, then halves.
ATTS_INLINE float sum_lanes(F8 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

ATTS_INLINE void sum_lanes_of_4(F8 a, F8 b, F8 c, F8 d, float* out) {
#if defined(__AVX2__)
  const __m256 pairs = _mm256_hadd_ps((__m256)a, (__m256)b), others = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 fours = _mm256_hadd_ps(pairs, others);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
  out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
#endif
}

ATTS_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

ATTS_INLINE F8 from_bf16(H8 bits) { return (F8)(__builtin_convertvector(bits, U8) << 16); }

ATTS_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // to nearest, ties to even
}

ATTS_INLINE H8 to_bf16(F8 value) {
  const U8 bits = (U8)value;
  const U8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U8 is_nan = (U8)((I8)(bits & 0x7fffffffu) > 0x7f800000);
  return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan), H8);
}

// Eight elements, or one, as fp32 and back.
ATTS_INLINE F8 load8(const uint16_t* from) { return from_bf16(load<H8>(from)); }
ATTS_INLINE F8 load8(const float* from) { return load<F8>(from); }
ATTS_INLINE void store8(uint16_t* to, F8 value) { store(to, to_bf16(value)); }
ATTS_INLINE void store8(float* to, F8 value) { store(to, value); }
ATTS_INLINE float load1(const uint16_t* from) { return from_bf16(*from); }
ATTS_INLINE float load1(const float* from) { return *from; }
ATTS_INLINE void store1(uint16_t* to, float value) { *to = to_bf16(value); }
ATTS_INLINE void store1(float* to, float value) { *to = value; }

// A value as an element holds it.
template <class T>
ATTS_INLINE F8 rounded(F8 value) {
  if constexpr (sizeof(T) == sizeof(float))
    return value;
  else
    return from_bf16(to_bf16(value));
}

// exp within 2 ulp on [-87.3, 88], 0 below, held at exp(88) above; NaN stays NaN. Range reduction by ln 2 in two parts
// (Cody and Waite), the series to its seventh term.
ATTS_INLINE F8 exp8(F8 x) {
  const I8 below = x < -87.3f;
  x = select(below, all(-87.3f), x);
  x = select(x > 88.0f, all(88.0f), x);
  const F8 shifter = all(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const F8 shifted = fma(x, all(1.44269504f), shifter);
  const F8 n = shifted - shifter;
  const F8 r = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145751953125f), x));
  F8 p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  const I8 exponent = ((I8)shifted - (I8)shifter + 127) << 23;
  return select(below, all(0.0f), p * (F8)exponent);
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CPU_VECTOR_H_
