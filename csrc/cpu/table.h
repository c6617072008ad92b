// What one instruction set compiles, and its table.
#ifndef ATTS_CPU_TABLE_H_
#define ATTS_CPU_TABLE_H_

#include "cpu/kernels.h"

namespace atts {

#define ATTS_DECLARE_KERNELS(isa, dot_packed)                                                                                    \
  namespace isa {                                                                                                    \
  void prepare(const uint16_t*, int64_t, int64_t, float*);                                                           \
  void dot(const float*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t);                               \
  void narrow(const float*, const uint16_t*, int64_t, uint16_t*);                                                    \
  void widen(const uint16_t*, int64_t, float*);                                                                      \
  void softmax_parts(float*, int64_t, float*, float*);                                                               \
  int64_t attention_scratch(const atts_attention_params&, int64_t);                                                  \
  void attend(const atts_attention_params&, int64_t, int64_t, int64_t, int64_t, float*);                             \
  void rms_norm(const atts_rms_norm_params&, int64_t, int64_t);                                                      \
  void silu_mul(const atts_silu_mul_params&, int64_t, int64_t);                                                      \
  void rope(const atts_rope_params&, int64_t, int64_t);                                                              \
  void extremes(const uint16_t*, int64_t, int16_t*, uint16_t*);                                                      \
  int64_t find(const uint16_t*, int64_t, uint16_t, uint16_t);                                                        \
  int64_t contenders(const uint16_t*, int64_t, int64_t, float, float, uint64_t, uint32_t*);                          \
  inline constexpr Kernels kTable{#isa,   prepare,  dot,      dot_packed, narrow,   widen, softmax_parts,             \
                                  attention_scratch, attend, rms_norm, silu_mul, rope, extremes, find, contenders};  \
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

}  // namespace atts

#endif  // ATTS_CPU_TABLE_H_
