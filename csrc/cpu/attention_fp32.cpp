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

constexpr int64_t kTile = 3;   // items (a query row and head) of a tile: 3 x 4 sums fill the registers
constexpr int64_t kKeys = 16;  // keys that every head takes in turn
constexpr int64_t kHeads = 8;  // KV heads that do, at most

template <class T>
struct Keys {
  const T* base;        // the KV head's first slot, of the keys or of the values
  const int64_t* slot;  // of each key: elements from there

  const T* row(int64_t key) const { return base + slot[key]; }
};

template <class T, int R>
void score(const float* q, int64_t dim, const Keys<T>& keys, int64_t first, int64_t last, float* scores,
           int64_t stride) {
  const T* columns[8];
  int64_t key = first;
  if constexpr (R == 1)  // four sums would wait for each other
    for (; key + 8 <= last; key += 8) {
      for (int c = 0; c < 8; ++c) columns[c] = keys.row(key + c);
      dot_tile<T, R, 8>(q, dim, columns, dim, scores + key, stride);
    }
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

// What a unit of work has of each KV head, the heads' own lying `*_stride` apart.
template <class T>
struct Unit {
  Keys<T> keys, values;  // of the first head; the next one's are dim elements on
  int64_t heads, dim;
  const float* q;  // widened
  int64_t q_stride;
  float* sums;    // [heads, kTile, dim]
  float* scores;  // [heads, kTile, stride]
  int64_t stride;

  Keys<T> keys_of(int64_t h) const { return {keys.base + h * dim, keys.slot}; }
  Keys<T> values_of(int64_t h) const { return {values.base + h * dim, values.slot}; }
  float* sums_of(int64_t h) const { return sums + h * kTile * dim; }
  float* scores_of(int64_t h) const { return scores + h * kTile * stride; }
};

// What a unit reads next, asked for while it works: the processor's own prefetching ends with a page of memory.
template <class T>
void ask(const Unit<T>& unit, const Keys<T>& keys, int64_t first, int64_t last) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t key = first; key < last; ++key)
    for (int64_t at = 0; at < unit.heads * unit.dim; at += kLine) __builtin_prefetch(keys.row(key) + at);
}

// A tile of R items; visible[r]: keys that item r sees, ascending; out[r]: of the first head, the next one's group * dim
// elements on. Heads lie side by side in a slot, so all of them take a few keys before the next ones are read.
template <class T, int R>
void attend_tile(const Unit<T>& unit, int64_t item, const int64_t* visible, T* const* out, int64_t group) {
  const int64_t dim = unit.dim, stride = unit.stride, shared = visible[0];
  for (int64_t first = 0; first < shared; first += kKeys) {
    const int64_t last = shared - first < kKeys ? shared : first + kKeys;
    if (last < shared)
      ask(unit, unit.keys, last, shared - last < kKeys ? shared : last + kKeys);
    else
      ask(unit, unit.values, 0, shared < kKeys ? shared : kKeys);
    for (int64_t h = 0; h < unit.heads; ++h)
      score<T, R>(unit.q + h * unit.q_stride + item * dim, dim, unit.keys_of(h), first, last, unit.scores_of(h),
                  stride);
  }
  float norm[kHeads][R];
  for (int64_t h = 0; h < unit.heads; ++h) {
    float* const scores = unit.scores_of(h);
    const float* const q = unit.q + h * unit.q_stride + item * dim;
    for (int r = 1; r < R; ++r)
      score<T, 1>(q + r * dim, dim, unit.keys_of(h), shared, visible[r], scores + r * stride, stride);
    for (int r = 0; r < R; ++r) {
      float peak;
      softmax_parts(scores + r * stride, visible[r], &peak, &norm[h][r]);
    }
    for (int64_t i = 0; i < R * dim; ++i) unit.sums_of(h)[i] = 0.0f;
  }
  for (int64_t first = 0; first < shared; first += kKeys) {
    const int64_t last = shared - first < kKeys ? shared : first + kKeys;
    if (last < shared) ask(unit, unit.values, last, shared - last < kKeys ? shared : last + kKeys);
    for (int64_t h = 0; h < unit.heads; ++h)
      mix<T, R>(unit.scores_of(h), stride, unit.values_of(h), first, last, dim, unit.sums_of(h));
  }
  for (int64_t h = 0; h < unit.heads; ++h) {
    for (int r = 0; r < R; ++r) {
      float* const sum = unit.sums_of(h) + r * dim;
      mix<T, 1>(unit.scores_of(h) + r * stride, stride, unit.values_of(h), shared, visible[r], dim, sum);
      T* const to = out[r] + h * group * dim;
      for (int64_t at = 0; at < dim; at += 16)
        for (int i = 0; i < 16; ++i) store1(to + at + i, sum[at + Sixteen<T>::place(i)] / norm[h][r]);
    }
  }
}

constexpr int64_t kScores = 48 << 10;  // floats of all heads' scores, where one head's are not more

// KV heads whose scores are held at once.
int64_t heads_at_once(int64_t heads, int64_t keys) {
  const int64_t fit = kScores / (kTile * keys), most = fit < kHeads ? fit : kHeads;
  return most < 1 ? 1 : heads < most ? heads : most;
}

// For every sequence of up to `longest` keys: a shorter one holds fewer scores of a head, but more heads at once.
int64_t attention_scratch(const atts_attention_params& p, int64_t longest) {
  const int64_t group = p.heads / p.kv_heads, stride = (longest + 7) / 8 * 8;
  const int64_t heads = heads_at_once(p.kv_heads, 8), most = heads * kTile * stride;
  const int64_t scores = most < kScores ? most : kScores, of_one = kTile * stride;
  return 2 * longest + heads * (kAttentionRows * group + kTile) * p.head_dim + (scores < of_one ? of_one : scores);
}

template <class T>
void attend(const atts_attention_params& p, int64_t b, int64_t h_first, int64_t h_last, int64_t first, int64_t last,
            float* scratch) {
  const int64_t group = p.heads / p.kv_heads, dim = p.head_dim;
  const int64_t slot = p.kv_heads * dim, start = p.cu_q[b];
  const int64_t before = p.kv_len[b] - (p.cu_q[b + 1] - start);  // tokens ahead of the sequence's first query row
  const int64_t seen = before + last, items = (last - first) * group;
  const int64_t stride = (seen + 7) / 8 * 8, heads = heads_at_once(h_last - h_first, stride);
  auto* const slots = reinterpret_cast<int64_t*>(scratch);
  const int32_t* page = p.block_table + b * p.table_width;
  for (int64_t key = 0, offset = 0; key < seen; ++key) {
    slots[key] = (*page * p.page + offset) * slot;
    if (++offset == p.page) offset = 0, ++page;
  }
  float* const q = scratch + 2 * seen;
  float* const sums = q + heads * items * dim;
  Unit<T> unit{{nullptr, slots}, {nullptr, slots}, 0, dim, q, items * dim, sums, sums + heads * kTile * dim, stride};
  for (int64_t h = h_first; h < h_last; h += heads) {
    unit.heads = h_last - h < heads ? h_last - h : heads;
    unit.keys.base = static_cast<const T*>(p.kv) + h * dim;
    unit.values.base = unit.keys.base + p.pages * p.page * slot;
    for (int64_t item = 0; item < unit.heads * items; ++item) {
      const int64_t row = start + first + item % items / group, head = (h + item / items) * group + item % group;
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
      if (n == 3) attend_tile<T, 3>(unit, item, visible, out, group);
      if (n == 2) attend_tile<T, 2>(unit, item, visible, out, group);
      if (n == 1) attend_tile<T, 1>(unit, item, visible, out, group);
    }
  }
}

}  // namespace

int64_t attention_scratch_fp32(const atts_attention_params& p, int64_t longest) {
  return attention_scratch(p, longest);
}

void attend_fp32(const atts_attention_params& p, int64_t b, int64_t h_first, int64_t h_last, int64_t first,
                 int64_t last, float* scratch) {
  attend<float>(p, b, h_first, h_last, first, last, scratch);
}

#if !defined(ATTS_BF16_PRODUCTS)
int64_t attention_scratch_bf16(const atts_attention_params& p, int64_t longest) {
  return attention_scratch(p, longest);
}

void attend_bf16(const atts_attention_params& p, int64_t b, int64_t h_first, int64_t h_last, int64_t first,
                 int64_t last, float* scratch) {
  attend<uint16_t>(p, b, h_first, h_last, first, last, scratch);
}
#endif

}  // namespace ATTS_ISA
}  // namespace atts
