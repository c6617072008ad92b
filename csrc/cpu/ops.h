// The host's ops behind their checks: what each entry point runs, and the decoder one after the other. Rows are 1
// or more. Included by files that are compiled once only.
#ifndef ATTS_CPU_OPS_H_
#define ATTS_CPU_OPS_H_

#include "atts/atts.h"

namespace atts {

// body(T{}) for the element type of a dtype that was checked: float or, for bfloat16, uint16_t.
template <class Body>
auto with_type(int32_t dtype, Body body) {
  return dtype == ATTS_FLOAT32 ? body(float{}) : body(uint16_t{});
}

inline atts_status check_dtype(int32_t dtype) {
  return dtype == ATTS_FLOAT32 || dtype == ATTS_BFLOAT16 ? ATTS_OK : ATTS_ERROR_DTYPE;
}

// x[rows, n] in the form in which the products read it; the calling thread's, until its next call, or x itself.
const float* prepared(const uint16_t* x, int64_t rows, int64_t n);
inline const float* prepared(const float* x, int64_t, int64_t) { return x; }

// out[r * out_stride + c] = x[r] . row first + c of a matrix of n columns, which is `packed` or, where that is NULL,
// `weight`. x is prepared; first and columns are multiples of 32 where it is packed.
void dot(const float* x, int64_t rows, const uint16_t* weight, const void* packed, int64_t first, int64_t columns,
         int64_t n, float* out, int64_t out_stride);
void dot(const float* x, int64_t rows, const float* weight, const void* packed, int64_t first, int64_t columns,
         int64_t n, float* out, int64_t out_stride);

// Whether it is NULL, or a packed matrix of these sizes beside bfloat16.
atts_status check_packed(const void* packed, int32_t dtype, int64_t out_features, int64_t in_features);

void linear(const atts_linear_params& p);
void rms_norm(const atts_rms_norm_params& p);
void silu_mul(const atts_silu_mul_params& p);
void rope(const atts_rope_params& p);

// cu_q, kv_len and the block table, which are there, against each other and the pool.
atts_status check_attention_batch(const atts_attention_params& p);
void attention(const atts_attention_params& p);

}  // namespace atts

#endif  // ATTS_CPU_OPS_H_
