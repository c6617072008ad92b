// What one instruction set compiles, and its table.
#ifndef ATTS_CPU_TABLE_H_
#define ATTS_CPU_TABLE_H_

#include "cpu/kernels.h"

namespace atts {

#define ATTS_DECLARE_ELEMENT(name, T)                                                                                  \
  void dot_##name(const float*, int64_t, const T*, int64_t, int64_t, float*, int64_t);                                 \
  void narrow_##name(const float*, const T*, int64_t, T*);                                                             \
  int64_t attention_scratch_##name(const atts_attention_params&, int64_t);                                             \
  void attend_##name(const atts_attention_params&, int64_t, int64_t, int64_t, int64_t, int64_t, float*);               \
  void rms_norm_##name(const atts_rms_norm_params&, int64_t, int64_t);                                                 \
  void silu_mul_##name(const atts_silu_mul_params&, int64_t, int64_t);                                                 \
  void rope_##name(const atts_rope_params&, int64_t, int64_t);                                                         \
  void extremes_##name(const T*, int64_t, OrderOf<T>*, BitsOf<T>*);                                                    \
  int64_t find_##name(const T*, int64_t, BitsOf<T>, BitsOf<T>);                                                        \
  int64_t contenders_##name(const T*, int64_t, int64_t, float, float, uint64_t, uint32_t*);

#define ATTS_ELEMENT_TABLE(name)                                                                                       \
  {dot_##name,      narrow_##name, attention_scratch_##name, attend_##name, rms_norm_##name,                           \
   silu_mul_##name, rope_##name,   extremes_##name,          find_##name,   contenders_##name}

#define ATTS_DECLARE_KERNELS(isa, dot_packed)                                                                          \
  namespace isa {                                                                                                      \
  ATTS_DECLARE_ELEMENT(bf16, uint16_t)                                                                                 \
  ATTS_DECLARE_ELEMENT(fp32, float)                                                                                    \
  void prepare(const uint16_t*, int64_t, int64_t, float*);                                                             \
  void widen(const uint16_t*, int64_t, float*);                                                                        \
  void softmax_parts(float*, int64_t, float*, float*);                                                                 \
  inline constexpr Kernels kTable{#isa,       ATTS_ELEMENT_TABLE(bf16), ATTS_ELEMENT_TABLE(fp32), prepare,             \
                                  dot_packed, widen,                    softmax_parts};                                \
  }

ATTS_DECLARE_KERNELS(plain, nullptr)
#if defined(__x86_64__)
ATTS_DECLARE_KERNELS(avx2, nullptr)
#if defined(ATTS_WITH_AVX512BF16)
namespace avx512bf16 {
void dot_packed(const float*, int64_t, const PackedMatrix&, int64_t, int64_t, float*, int64_t);
}
ATTS_DECLARE_KERNELS(avx512bf16, dot_packed)
#endif
#endif

#undef ATTS_DECLARE_KERNELS
#undef ATTS_ELEMENT_TABLE
#undef ATTS_DECLARE_ELEMENT

}  // namespace atts

#endif  // ATTS_CPU_TABLE_H_
