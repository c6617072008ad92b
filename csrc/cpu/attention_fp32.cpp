// Causal attention over pages of keys and values, for decode steps and spans alike.
//
// A row's bits depend on its own query, keys and values alone: products and sums run in the order of the keys, whatever
// rows and heads share a tile.
#include "cpu/fp32.h"
#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace ATTS_ISA {
namespace {

constexpr int64_t kTile = 3;  // items (a query row and head) of a tile: 3 x 4 sums fill the registers

template <class T>
struct Keys {
  const T* base;  // the KV head's first slot, of the keys or of the values
  const int32_t* pages;
  int64_t page, page_stride, slot_stride;

  const T* row(int64_t key) const {
    return base + pages[key / page] * page_stride + key % page * slot_stride;
  }
};

template <class T, int R>
void score(const float* q, int64_t dim, const Keys<T>& keys, int64_t first, int64_t last, float* scores,
           int64_t stride) {
  const T* columns[4];
  int64_t key = first;
  for (; key + 4 <= last; key += 4) {
    for (int c = 0; c < 4; ++c) columns[c] = keys.row(key + c);
    dot_tile<T, R, 4>(q, dim, columns, dim, scores + key, stride);
  }
  for (; key < last; ++key) {
    columns[0] = keys.row(key);
    dot_tile<T, R, 1>(q, dim, columns, dim, scores + key, stride);
  }
}

// sums[r] += weights[r][key] * value[key], keys in order; the sums lie as `widen_row` lays them.
template <class T, int R, int N>
ATTS_INLINE void mix_part(const float* weights, int64_t stride, const Keys<T>& values, int64_t first, int64_t last,
                          int64_t at, int64_t dim, float* sums) {
  using S = Sixteen<T>;
  using V = typename S::V;
  constexpr int kAll = N * S::kParts;
  constexpr int64_t kLanes = 16 / S::kParts;
  V sum[R][kAll];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kAll; ++i) sum[r][i] = load<V>(sums + r * dim + at + i * kLanes);
  for (int64_t key = first; key < last; ++key) {
    const T* value = values.row(key) + at;
#pragma GCC unroll 4
    for (int i = 0; i < kAll; ++i) {
      const V own = S::part(value + i / S::kParts * 16, i % S::kParts);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = fma(S::every(weights[r * stride + key]), own, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kAll; ++i) store(sums + r * dim + at + i * kLanes, sum[r][i]);
}

template <class T, int R>
void mix(const float* weights, int64_t stride, const Keys<T>& values, int64_t first, int64_t last, int64_t dim,
         float* sums) {
  if (first >= last) return;
  int64_t at = 0;
  for (; at + 32 <= dim; at += 32) mix_part<T, R, 2>(weights, stride, values, first, last, at, dim, sums);
  for (; at < dim; at += 16) mix_part<T, R, 1>(weights, stride, values, first, last, at, dim, sums);
}

// A tile of R items; visible[r]: keys that item r sees, ascending.
template <class T, int R>
void attend_tile(const float* q, int64_t dim, const Keys<T>& keys, const Keys<T>& values, const int64_t* visible,
                 float* scratch, T* const* out) {
  const int64_t stride = (visible[R - 1] + 7) / 8 * 8;
  float* sums = scratch;
  float* scores = scratch + kTile * dim;
  const int64_t shared = visible[0];
  score<T, R>(q, dim, keys, 0, shared, scores, stride);
  for (int r = 1; r < R; ++r) score<T, 1>(q + r * dim, dim, keys, shared, visible[r], scores + r * stride, stride);
  float norm[R];
  for (int r = 0; r < R; ++r) {
    float peak;
    softmax_parts(scores + r * stride, visible[r], &peak, &norm[r]);
  }
  for (int64_t i = 0; i < R * dim; ++i) sums[i] = 0.0f;
  mix<T, R>(scores, stride, values, 0, shared, dim, sums);
  for (int r = 1; r < R; ++r) mix<T, 1>(scores + r * stride, stride, values, shared, visible[r], dim, sums + r * dim);
  for (int r = 0; r < R; ++r) {
    const float* sum = sums + r * dim;
    for (int64_t at = 0; at < dim; at += 16)
      for (int i = 0; i < 16; ++i) store1(out[r] + at + i, sum[at + Sixteen<T>::place(i)] / norm[r]);
  }
}

int64_t attention_scratch(const atts_attention_params& p, int64_t longest) {
  const int64_t group = p.heads / p.kv_heads;
  return kAttentionRows * group * p.head_dim + kTile * p.head_dim + kTile * ((longest + 7) / 8 * 8);
}

template <class T>
void attend(const atts_attention_params& p, int64_t b, int64_t h, int64_t first, int64_t last, float* scratch) {
  const int64_t group = p.heads / p.kv_heads, dim = p.head_dim;
  const int64_t slot = p.kv_heads * dim, start = p.cu_q[b];
  const int64_t before = p.kv_len[b] - (p.cu_q[b + 1] - start);  // tokens ahead of the sequence's first query row
  const Keys<T> keys{static_cast<const T*>(p.kv) + h * dim, p.block_table + b * p.table_width, p.page, p.page * slot, slot};
  Keys<T> values = keys;
  values.base += p.pages * p.page * slot;
  const int64_t items = (last - first) * group;
  float* q = scratch;
  float* rest = scratch + kAttentionRows * group * dim;
  for (int64_t item = 0; item < items; ++item) {
    const int64_t row = start + first + item / group, head = h * group + item % group;
    widen_row(static_cast<const T*>(p.q) + (row * p.heads + head) * dim, dim, p.scale, q + item * dim);
  }
  for (int64_t item = 0; item < items; item += kTile) {
    const int64_t n = items - item < kTile ? items - item : kTile;
    int64_t visible[kTile];
    T* out[kTile];
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + (item + r) / group, head = h * group + (item + r) % group;
      visible[r] = before + row + 1;
      out[r] = static_cast<T*>(p.out) + ((start + row) * p.heads + head) * dim;
    }
    if (n == 3) attend_tile<T, 3>(q + item * dim, dim, keys, values, visible, rest, out);
    if (n == 2) attend_tile<T, 2>(q + item * dim, dim, keys, values, visible, rest, out);
    if (n == 1) attend_tile<T, 1>(q + item * dim, dim, keys, values, visible, rest, out);
  }
}

}  // namespace

int64_t attention_scratch_fp32(const atts_attention_params& p, int64_t longest) { return attention_scratch(p, longest); }

void attend_fp32(const atts_attention_params& p, int64_t b, int64_t h, int64_t first, int64_t last, float* scratch) {
  attend<float>(p, b, h, first, last, scratch);
}

#if !defined(ATTS_BF16_PRODUCTS)
int64_t attention_scratch_bf16(const atts_attention_params& p, int64_t longest) { return attention_scratch(p, longest); }

void attend_bf16(const atts_attention_params& p, int64_t b, int64_t h, int64_t first, int64_t last, float* scratch) {
  attend<uint16_t>(p, b, h, first, last, scratch);
}
#endif

}  // namespace ATTS_ISA
}  // namespace atts
