// What both forms of an entry point check of a params struct, without reading an array.
#ifndef ATTS_CHECKS_H_
#define ATTS_CHECKS_H_

#include <cstddef>
#include <cstdint>

#include "atts/atts.h"

namespace atts {

// Bytes of an element, 0 for what is no atts_dtype.
constexpr int64_t element_bytes(int32_t dtype) {
  return dtype == ATTS_FLOAT32 ? 4 : dtype == ATTS_FLOAT16 || dtype == ATTS_BFLOAT16 ? 2 : 0;
}

// The product of non-negative numbers, or -1 where 63 bits do not hold it.
template <class... Rest>
int64_t product(int64_t first, Rest... rest) {
  int64_t value = first;
  bool overflow = false;
  ((overflow = overflow || __builtin_mul_overflow(value, static_cast<int64_t>(rest), &value)), ...);
  return overflow ? -1 : value;
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether each array, NULL or not, is aligned to its element.
template <class... T>
bool all_aligned(const T*... arrays) {
  return (... && aligned(arrays, alignof(T)));
}

// Whether arrays of a dtype that was checked, NULL or not, are aligned to their element.
template <class... Pointers>
bool elements_aligned(int32_t dtype, Pointers... arrays) {
  return (... && aligned(arrays, element_bytes(dtype)));
}

template <class Params>
atts_status check_struct(const Params* params) {
  if (params == nullptr) return ATTS_ERROR_NULL_POINTER;
  return params->struct_size == sizeof(Params) ? ATTS_OK : ATTS_ERROR_ABI;
}

// A [rows, heads, width] array: ATTS_ERROR_STRIDE where two elements share a place, ATTS_ERROR_SHAPE where its last
// byte cannot be addressed.
inline atts_status check_strides(int64_t rows, int64_t heads, int64_t width, int64_t row_stride, int64_t head_stride,
                                 int64_t bytes) {
  if (rows <= 1) row_stride = width;
  if (heads <= 1) head_stride = width;
  if (row_stride < width || head_stride < width) return ATTS_ERROR_STRIDE;
  const int64_t row_reach = product(rows, row_stride, bytes), head_reach = product(heads, head_stride, bytes);
  if (row_reach < 0 || head_reach < 0 || row_reach > INT64_MAX - head_reach) return ATTS_ERROR_SHAPE;
  // Heads inside a row, or rows inside a head: one of the two strides has to step over all of the other dimension.
  if (rows > 1 && heads > 1 && row_stride < (heads - 1) * head_stride + width &&
      head_stride < (rows - 1) * row_stride + width)
    return ATTS_ERROR_STRIDE;
  return ATTS_OK;
}

inline atts_status check_gate_sizes(const atts_gate_params& g) {
  if (g.batch < 0 || g.keys < 1 || g.capacity < 1 || g.capacity > ATTS_GATE_MAX_CAPACITY) return ATTS_ERROR_SHAPE;
  return product(g.keys, g.capacity, sizeof(float)) < 0 || product(g.batch, 16) < 0 ? ATTS_ERROR_SHAPE : ATTS_OK;
}

inline atts_status check_gate(const atts_gate_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_gate_params& g = *params;
  if (const atts_status status = check_gate_sizes(g)) return status;
  if (!g.ring || !g.size || !g.head) return ATTS_ERROR_NULL_POINTER;
  if (!all_aligned(g.score, g.key, g.level, g.u, g.ring, g.size, g.head, g.greater, g.ties, g.n, g.p, g.error))
    return ATTS_ERROR_ALIGNMENT;
  if (g.batch == 0) return ATTS_OK;
  const bool inputs = g.score && g.key && g.level && g.u && g.insert;
  const bool outputs = g.greater && g.ties && g.n && g.takeover && g.p;
  return inputs && outputs ? ATTS_OK : ATTS_ERROR_NULL_POINTER;
}

inline atts_status check_span_mean(const atts_span_mean_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_span_mean_params& p = *params;
  if (p.tokens < 0 || p.batch < 0 || product(p.tokens, sizeof(float)) < 0 || product(p.batch, sizeof(double)) < 0)
    return ATTS_ERROR_SHAPE;
  if (!p.cu_seqlens || (p.tokens > 0 && !p.logprob) || (p.batch > 0 && (!p.score || !p.sum)))
    return ATTS_ERROR_NULL_POINTER;
  return all_aligned(p.logprob, p.cu_seqlens, p.score, p.sum, p.error) ? ATTS_OK : ATTS_ERROR_ALIGNMENT;
}

inline atts_status check_score_logits_sizes(const atts_score_logits_params& p) {
  if (element_bytes(p.dtype) == 0) return ATTS_ERROR_DTYPE;
  if (p.rows < 0 || p.vocab < 1 || p.batch < 0) return ATTS_ERROR_SHAPE;
  return check_strides(p.rows, 1, p.vocab, p.logits_stride, p.vocab, element_bytes(p.dtype));
}

inline atts_status check_score_logits(const atts_score_logits_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_score_logits_params& p = *params;
  if (const atts_status status = check_score_logits_sizes(p)) return status;
  if (p.rows > 0 && (!p.logits || !p.ids || !p.logprob)) return ATTS_ERROR_NULL_POINTER;
  const bool spans = p.cu_seqlens != nullptr;
  if (!spans && (p.score || p.sum)) return ATTS_ERROR_NULL_POINTER;
  if (!spans && p.batch > 0) return ATTS_ERROR_SHAPE;
  if (spans && p.batch > 0 && (!p.score || !p.sum)) return ATTS_ERROR_NULL_POINTER;
  if (product(p.batch, sizeof(double)) < 0) return ATTS_ERROR_SHAPE;
  if (!aligned(p.logits, element_bytes(p.dtype)) ||
      !all_aligned(p.ids, p.logprob, p.cu_seqlens, p.score, p.sum, p.error))
    return ATTS_ERROR_ALIGNMENT;
  return ATTS_OK;
}

inline atts_status check_kv_append(const atts_kv_append_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_kv_append_params& p = *params;
  const int64_t bytes = element_bytes(p.dtype);
  if (bytes == 0) return ATTS_ERROR_DTYPE;
  if (p.rows < 0 || p.kv_heads < 1 || p.head_dim < 1 || p.slot_count < 0) return ATTS_ERROR_SHAPE;
  if (p.q != nullptr ? p.heads < 1 : p.heads != 0) return ATTS_ERROR_SHAPE;
  if (p.cosine != nullptr && p.head_dim % 2) return ATTS_ERROR_SHAPE;
  if (product(2, p.slot_count, p.kv_heads, p.head_dim, bytes) < 0) return ATTS_ERROR_SHAPE;
  if (product(p.rows, p.head_dim, sizeof(float)) < 0) return ATTS_ERROR_SHAPE;
  if (p.slots == nullptr) {
    if (p.page < 1 || p.slot_count % p.page || p.batch < 0 || p.table_width < 0) return ATTS_ERROR_SHAPE;
    if (product(p.batch, p.table_width, sizeof(int32_t)) < 0 || product(p.table_width, p.page) < 0)
      return ATTS_ERROR_SHAPE;
  } else if (p.batch != 0 || p.table_width != 0) {
    return ATTS_ERROR_SHAPE;
  }
  if ((p.q == nullptr) != (p.q_out == nullptr) || (p.cosine == nullptr) != (p.sine == nullptr) ||
      (p.q != nullptr && p.cosine == nullptr) || (p.slots != nullptr && (p.block_table || p.cu_q || p.kv_len)))
    return ATTS_ERROR_NULL_POINTER;
  if (const atts_status s = check_strides(p.rows, p.kv_heads, p.head_dim, p.k_stride, p.k_head_stride, bytes)) return s;
  if (const atts_status s = check_strides(p.rows, p.kv_heads, p.head_dim, p.v_stride, p.v_head_stride, bytes)) return s;
  if (p.q != nullptr) {
    if (const atts_status s = check_strides(p.rows, p.heads, p.head_dim, p.q_stride, p.q_head_stride, bytes)) return s;
    if (const atts_status s = check_strides(p.rows, p.heads, p.head_dim, p.q_out_stride, p.q_out_head_stride, bytes))
      return s;
  }
  if (!aligned(p.k, bytes) || !aligned(p.v, bytes) || !aligned(p.kv, bytes) || !aligned(p.q, bytes) ||
      !aligned(p.q_out, bytes) ||
      !all_aligned(p.cosine, p.sine, p.slots, p.block_table, p.cu_q, p.kv_len, p.error))
    return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (!p.k || !p.v || !p.kv) return ATTS_ERROR_NULL_POINTER;
  if (p.slots == nullptr && (!p.block_table || !p.cu_q || !p.kv_len)) return ATTS_ERROR_NULL_POINTER;
  return ATTS_OK;
}

// The geometry that the page ops share.
struct Pool {
  int64_t planes;      // layers, keys and values apart
  int64_t pages;       // of each plane
  int64_t page_bytes;  // of one plane's page
};

// The pool of a page op; its planes are 0 where the sizes are refused.
template <class Params>
Pool pool_of(const Params& p) {
  if (p.layers < 1 || p.pages < 1 || p.page < 1 || p.kv_heads < 1 || p.head_dim < 1) return {};
  const int64_t bytes = element_bytes(p.dtype);
  if (product(p.layers, 2, p.pages, p.page, p.kv_heads, p.head_dim, bytes) < 0) return {};
  return {2 * p.layers, p.pages, p.page * p.kv_heads * p.head_dim * bytes};
}

// `sizes` in one call: pages named, and how many a dense array or host pool of the other side holds.
template <class Params>
atts_status check_pages(const Params* params, int64_t other_pages, const void* other, const int64_t* first,
                        const int64_t* second) {
  const Params& p = *params;
  if (element_bytes(p.dtype) == 0) return ATTS_ERROR_DTYPE;
  const Pool pool = pool_of(p);
  if (pool.planes == 0 || p.count < 0 || product(p.count, sizeof(int64_t)) < 0) return ATTS_ERROR_SHAPE;
  if (product(other_pages, pool.planes, pool.page_bytes) < 0) return ATTS_ERROR_SHAPE;
  if (!aligned(p.kv, element_bytes(p.dtype)) || !aligned(other, element_bytes(p.dtype)) || !all_aligned(first, second))
    return ATTS_ERROR_ALIGNMENT;
  return p.count > 0 && (!p.kv || !other || !first || !second) ? ATTS_ERROR_NULL_POINTER : ATTS_OK;
}

inline atts_status check_kv_copy_pages(const atts_kv_copy_pages_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  if (!all_aligned(params->error)) return ATTS_ERROR_ALIGNMENT;
  return check_pages(params, params->count, params->kv, params->src, params->dst);
}

inline atts_status check_kv_gather(const atts_kv_gather_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  if (params->scatter != 0 && params->scatter != 1) return ATTS_ERROR_SHAPE;
  if (!all_aligned(params->error)) return ATTS_ERROR_ALIGNMENT;
  return check_pages(params, params->count, params->dense, params->page_ids, params->page_ids);
}

// Reads the lists too: they are host memory in both forms.
inline atts_status check_kv_swap(const atts_kv_swap_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_kv_swap_params& p = *params;
  if (p.host_slots < 1 || (p.to_host != 0 && p.to_host != 1)) return ATTS_ERROR_SHAPE;
  if (const atts_status status = check_pages(params, p.host_slots, p.host, p.page_ids, p.slots)) return status;
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.page_ids[i] < 0 || p.page_ids[i] >= p.pages) return ATTS_ERROR_KEY;
    if (p.slots[i] < 0 || p.slots[i] >= p.host_slots) return ATTS_ERROR_KEY;
  }
  return ATTS_OK;
}

}  // namespace atts

#endif  // ATTS_CHECKS_H_
