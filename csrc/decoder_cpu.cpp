// A decoder's forward pass on the host: the ops one after the other, without a caller between them.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace atts {
namespace {

constexpr int64_t kAlignment = 16;

// Arrays of the workspace, [rows, their width] each, one behind the other.
template <class T>
struct Workspace {
  T* x;            // the residual stream, hidden
  T* delta;        // what is added to it, hidden
  T* wide;         // qkv, and in its place attention's result; the gate and what it is multiplied with
  T* narrow;       // q, turned; the gate's product
  int64_t* slots;  // 1
  int64_t bytes;

  Workspace(const atts_decoder_params& p, void* at) {
    const int64_t q = p.heads * p.head_dim, qkv = q + 2 * p.kv_heads * p.head_dim;
    const auto begin = reinterpret_cast<uintptr_t>(at);
    bytes = 0;
    const auto take = [&](auto** array, int64_t width) {
      *array = reinterpret_cast<std::remove_reference_t<decltype(*array)>>(begin + static_cast<uintptr_t>(bytes));
      bytes += (p.rows * width * static_cast<int64_t>(sizeof **array) + kAlignment - 1) / kAlignment * kAlignment;
    };
    take(&x, p.hidden);
    take(&delta, p.hidden);
    take(&wide, std::max(qkv, 2 * p.inner));
    take(&narrow, std::max(q, p.inner));
    take(&slots, 1);
  }
};

atts_status check_sizes(const atts_decoder_params& p) {
  if (p.rows < 0 || p.batch < 0 || p.table_width < 0 || p.pages < 1 || p.page < 1 || p.layers < 1 || p.vocab < 1 ||
      p.hidden < 1 || p.inner < 1 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.head_dim < 16 ||
      p.head_dim % 16 || p.max_positions < 1 || p.threads < 1)
    return ATTS_ERROR_SHAPE;
  if (const atts_status status = check_dtype(p.dtype)) return status;
  const int64_t bytes = element_bytes(p.dtype);
  const int64_t sizes[] = {product(p.vocab, p.hidden, bytes), product(p.max_positions, p.head_dim, 2),
                           product(p.layers, 2, p.pages, p.page, p.kv_heads, p.head_dim, bytes),
                           product(p.batch, p.table_width, 4), product(p.table_width, p.page),
                           product(p.heads, p.head_dim, 3, p.hidden, bytes), product(p.inner, 2, p.hidden, bytes),
                           // No array of the workspace is wider, and there are four and the slots.
                           product(p.rows, p.heads, p.head_dim, 3, 8 * bytes), product(p.rows, p.inner, 2, 8 * bytes),
                           product(p.rows, p.hidden, 8 * bytes)};
  return *std::min_element(std::begin(sizes), std::end(sizes)) < 0 ? ATTS_ERROR_SHAPE : ATTS_OK;
}

atts_status check_arrays(const atts_decoder_params& p) {
  if (!p.layer || !p.embed || !p.norm || !p.cosine || !p.sine || !p.cu_q || (p.batch > 0 && !p.kv_len))
    return ATTS_ERROR_NULL_POINTER;
  if (p.rows > 0 && (!p.ids || !p.positions || !p.block_table || !p.kv || !p.out || !p.workspace))
    return ATTS_ERROR_NULL_POINTER;
  const auto elements = [&](auto... arrays) { return elements_aligned(p.dtype, arrays...); };
  if (!all_aligned(p.layer, p.cosine, p.sine, p.ids, p.positions, p.block_table, p.cu_q, p.kv_len) ||
      !elements(p.embed, p.norm, p.kv, p.out) || !aligned(p.workspace, kAlignment))
    return ATTS_ERROR_ALIGNMENT;
  for (const atts_decoder_layer* l = p.layer; l < p.layer + p.layers; ++l) {
    if (!l->attn_norm || !l->mlp_norm || !l->q_norm != !l->k_norm || !(l->qkv || l->qkv_packed) ||
        !(l->out || l->out_packed) || !(l->gate_up || l->gate_up_packed) || !(l->down || l->down_packed))
      return ATTS_ERROR_NULL_POINTER;
    if (!elements(l->attn_norm, l->qkv, l->qkv_bias, l->q_norm, l->k_norm, l->out, l->mlp_norm, l->gate_up, l->down))
      return ATTS_ERROR_ALIGNMENT;
    const int64_t q_width = p.heads * p.head_dim, qkv_width = q_width + 2 * p.kv_heads * p.head_dim;
    for (const atts_status status : {check_packed(l->qkv_packed, p.dtype, qkv_width, p.hidden),
                                     check_packed(l->out_packed, p.dtype, p.hidden, q_width),
                                     check_packed(l->gate_up_packed, p.dtype, 2 * p.inner, p.hidden),
                                     check_packed(l->down_packed, p.dtype, p.hidden, p.inner)})
      if (status != ATTS_OK) return status;
  }
  return ATTS_OK;
}

template <class T>
atts_attention_params attention_of(const atts_decoder_params& p, int64_t layer, const T* q, T* out) {
  const T* kv = static_cast<const T*>(p.kv) + layer * 2 * p.pages * p.page * p.kv_heads * p.head_dim;
  return {sizeof(atts_attention_params), q, kv, p.block_table, p.cu_q, p.kv_len, out, p.rows, p.batch, p.table_width,
          p.pages, p.page, p.heads, p.kv_heads, p.head_dim, p.scale, p.dtype, p.threads};
}

// Slots by the block table, once for all layers; the batch has been checked.
atts_status find_slots(const atts_decoder_params& p, int64_t* slots) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t row = p.cu_q[b]; row < p.cu_q[b + 1]; ++row) {
      const int64_t position = p.positions[row], index = position / p.page;
      if (position < 0 || position >= p.max_positions || index >= p.table_width) return ATTS_ERROR_KEY;
      const int64_t page = p.block_table[b * p.table_width + index];
      if (page < 0 || page >= p.pages) return ATTS_ERROR_KEY;
      slots[row] = page * p.page + position % p.page;
    }
  }
  return ATTS_OK;
}

// A row of wide holds q, k and v: q turned to narrow, k turned and v to their slot.
template <class T>
void place(const atts_decoder_params& p, int64_t layer, const Workspace<T>& w, int64_t row) {
  const ElementKernels<T>& run = kernels().of<T>();
  const atts_decoder_layer& l = p.layer[layer];
  const int64_t dim = p.head_dim, q_width = p.heads * dim, kv_width = p.kv_heads * dim;
  T *q = w.wide + row * (q_width + 2 * kv_width), *k = q + q_width, *v = k + kv_width;
  if (l.q_norm != nullptr) {
    run.rms_norm({sizeof(atts_rms_norm_params), q, nullptr, l.q_norm, nullptr, q, p.heads, dim, dim, p.eps, p.dtype, 1},
                 0, p.heads);
    run.rms_norm(
        {sizeof(atts_rms_norm_params), k, nullptr, l.k_norm, nullptr, k, p.kv_heads, dim, dim, p.eps, p.dtype, 1}, 0,
        p.kv_heads);
  }
  T* keys = static_cast<T*>(p.kv) + (layer * 2 * p.pages * p.page + w.slots[row]) * kv_width;
  const float *cosine = p.cosine + p.positions[row] * (dim / 2), *sine = p.sine + p.positions[row] * (dim / 2);
  run.rope({sizeof(atts_rope_params), q, cosine, sine, w.narrow + row * q_width, 1, p.heads, dim, q_width, p.dtype, 1},
           0, 1);
  run.rope({sizeof(atts_rope_params), k, cosine, sine, keys, 1, p.kv_heads, dim, kv_width, p.dtype, 1}, 0, 1);
  std::memcpy(keys + p.pages * p.page * kv_width, v, static_cast<size_t>(kv_width) * sizeof *v);
}

template <class T>
void forward(const atts_decoder_params& p, const Workspace<T>& w) {
  const int64_t q_width = p.heads * p.head_dim, qkv_width = q_width + 2 * p.kv_heads * p.head_dim;
  T* const normed = static_cast<T*>(p.out);
  const auto product_of = [&](const T* x, int64_t n, const void* weight, const void* packed, const void* bias, T* out,
                              int64_t width) {
    linear({sizeof(atts_linear_params), x, weight, packed, bias, out, p.rows, n, width, p.dtype, p.threads});
  };
  // A residual is added on the way into the norm behind it.
  const auto norm = [&](const T* delta, const void* weight) {
    rms_norm({sizeof(atts_rms_norm_params), w.x, delta, weight, delta == nullptr ? nullptr : w.x, normed, p.rows,
              p.hidden, p.hidden, p.eps, p.dtype, p.threads});
  };
  for (int64_t row = 0; row < p.rows; ++row)
    std::memcpy(w.x + row * p.hidden, static_cast<const T*>(p.embed) + p.ids[row] * p.hidden,
                static_cast<size_t>(p.hidden) * sizeof *w.x);
  norm(nullptr, p.layer[0].attn_norm);
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const atts_decoder_layer& l = p.layer[layer];
    product_of(normed, p.hidden, l.qkv, l.qkv_packed, l.qkv_bias, w.wide, qkv_width);
    parallel_rows(p.rows, qkv_width, p.threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) place(p, layer, w, row);
    });
    attention(attention_of<T>(p, layer, w.narrow, w.wide));
    product_of(w.wide, q_width, l.out, l.out_packed, nullptr, w.delta, p.hidden);
    norm(w.delta, l.mlp_norm);
    product_of(normed, p.hidden, l.gate_up, l.gate_up_packed, nullptr, w.wide, 2 * p.inner);
    silu_mul({sizeof(atts_silu_mul_params), w.wide, w.wide + p.inner, w.narrow, p.rows, p.inner, 2 * p.inner,
              2 * p.inner, p.dtype, p.threads});
    product_of(w.narrow, p.inner, l.down, l.down_packed, nullptr, w.delta, p.hidden);
    norm(w.delta, layer + 1 < p.layers ? p.layer[layer + 1].attn_norm : p.norm);
  }
}

template <class T>
atts_status run(const atts_decoder_params& p) {
  const Workspace<T> workspace(p, p.workspace);
  if (p.workspace_bytes < static_cast<uint64_t>(workspace.bytes)) return ATTS_ERROR_WORKSPACE;
  if (const atts_status status = check_attention_batch(attention_of<T>(p, 0, nullptr, nullptr))) return status;
  if (p.rows == 0) return ATTS_OK;
  for (int64_t row = 0; row < p.rows; ++row)
    if (p.ids[row] < 0 || p.ids[row] >= p.vocab) return ATTS_ERROR_KEY;
  if (const atts_status status = find_slots(p, workspace.slots)) return status;
  forward(p, workspace);
  return ATTS_OK;
}

}  // namespace
}  // namespace atts

extern "C" int atts_decoder_cpu_workspace(const atts_decoder_params* params, uint64_t* bytes) {
  if (const int status = atts::check_struct(params)) return status;
  if (bytes == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (const int status = atts::check_sizes(*params)) return status;
  *bytes = atts::with_type(params->dtype, [&](auto element) {
    return static_cast<uint64_t>(atts::Workspace<decltype(element)>(*params, nullptr).bytes);
  });
  return ATTS_OK;
}

extern "C" int atts_decoder_cpu(const atts_decoder_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_decoder_params& p = *params;
  if (const int status = atts::check_sizes(p)) return status;
  if (const int status = atts::check_arrays(p)) return status;
  return atts::with_type(p.dtype, [&](auto element) { return atts::run<decltype(element)>(p); });
}
