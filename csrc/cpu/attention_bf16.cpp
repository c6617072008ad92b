// Causal attention over pages of bfloat16 by the processor's own products, for decode steps and spans alike.
//
// Keys are taken in chunks at fixed places, each with an exact running maximum: a row's bits depend on its own query, keys
// and values alone. A chunk that a row does not see leaves it untouched, and a maximum that stays makes a factor of 1.
#include <algorithm>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace ATTS_ISA {

namespace {

constexpr int64_t kChunk = 64;        // keys whose scores are held at once
constexpr int64_t kBlockWords = 128;  // of a key: heads of up to 256 elements are transposed in one piece
constexpr int64_t kMixRows = 4;       // 4 x 4 sums and four values' sixteen elements each

// Pointers to the keys first .. first + n - 1 of one head.
void find_keys(const atts_attention_params& p, int64_t b, int64_t h, int64_t first, int64_t n, const uint16_t** key) {
  const int64_t slot = p.kv_heads * p.head_dim;
  const int32_t* page = p.block_table + b * p.table_width + first / p.page;
  int64_t offset = first % p.page;
  for (int64_t i = 0; i < n; ++i) {
    key[i] = static_cast<const uint16_t*>(p.kv) + (*page * p.page + offset) * slot + h * p.head_dim;
    if (++offset == p.page) offset = 0, ++page;
  }
}

// scores[item * kChunk + i] = q[item] . key[i] for i < n.
void score(const uint32_t* q, int64_t items, int64_t dim, const uint16_t* const* key, int64_t n, float* scores) {
  alignas(64) uint32_t block[kBlockWords * 2 * kLanes];
  const int64_t all = dim / 2, tiles = (items + kTileRows - 1) / kTileRows;
  Ahead none{nullptr, nullptr, 0};
  for (int64_t at = 0; at < n; at += 2 * kLanes) {
    const int64_t groups = n - at > kLanes ? 2 : 1;
    const uint16_t* column[2 * kLanes];  // those beyond the last repeat it
    for (int64_t i = 0; i < groups * kLanes; ++i) column[i] = key[std::min(at + i, n - 1)];
    for (int64_t first = 0; first < all; first += kBlockWords) {
      const int64_t words = std::min(all - first, kBlockWords);
      for (int64_t g = 0; g < groups; ++g)
        transpose_columns(column + g * kLanes, dim, 2 * first, words, block + g * kLanes, groups * kLanes);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t item = t * items / tiles, rows = (t + 1) * items / tiles - item;
        const Tile tile = groups == 2 ? kTiles<2>[rows - 1] : kTiles<1>[rows - 1];
        tile(q + item * all + first, all, block, words, first == 0, 0xffff, scores + item * kChunk + at, kChunk, none);
      }
    }
  }
}

// exp within 2 ulp above -87.3, with gradual underflow to 0 below; NaN stays NaN. As exp8 of vector.h.
ATTS_INLINE __m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // the second operand where either is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(p, n);
}

// Scores of one item to weights exp(score * scale - peak); the peak and the norm take them in. Returns what earlier sums
// are to be multiplied with.
float weigh(float* scores, int64_t n, float scale, float* peak, float* norm) {
  constexpr int kVectors = kChunk / kLanes;
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  __m512 v[kVectors], peaks = _mm512_set1_ps(*peak);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const int64_t left = std::clamp<int64_t>(n - i * kLanes, 0, kLanes);
    const auto live = static_cast<__mmask16>((1u << left) - 1);
    v[i] = _mm512_mask_mul_ps(nothing, live, _mm512_loadu_ps(scores + i * kLanes), _mm512_set1_ps(scale));
    peaks = _mm512_max_ps(v[i], peaks);  // a NaN is passed over here and comes back as a weight
  }
  const float highest = _mm512_reduce_max_ps(peaks);
  const float factor = _mm512_cvtss_f32(exp16(_mm512_set1_ps(*peak - highest)));
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const __m512 weight = exp16(_mm512_sub_ps(v[i], _mm512_set1_ps(highest)));
    _mm512_storeu_ps(scores + i * kLanes, weight);
    total = _mm512_add_ps(total, weight);
  }
  *norm = *norm * factor + _mm512_reduce_add_ps(total);
  *peak = highest;
  return factor;
}

// sums[r][at ..] = factor[r] * sums[r][at ..] + weights[r][i] * value[i][at ..] for i in first .. last-1, in order.
template <int R, int N>
ATTS_INLINE void mix_part(const float* weights, const uint16_t* const* value, int64_t first, int64_t last, int64_t at,
                          int64_t dim, const float* factor, float* sums) {
  __m512 sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
      sum[r][i] = _mm512_mul_ps(_mm512_loadu_ps(sums + r * dim + at + i * kLanes), _mm512_set1_ps(factor[r]));
  for (int64_t key = first; key < last; ++key) {
    __m512 v[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value[key] + at + i * kLanes));
      v[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * kChunk + key]);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[r][i] = _mm512_fmadd_ps(weight, v[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) _mm512_storeu_ps(sums + r * dim + at + i * kLanes, sum[r][i]);
}

template <int R>
void mix(const float* weights, const uint16_t* const* value, int64_t first, int64_t last, int64_t dim,
         const float* factor, float* sums) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= dim; at += 4 * kLanes) mix_part<R, 4>(weights, value, first, last, at, dim, factor, sums);
  for (; at < dim; at += kLanes) mix_part<R, 1>(weights, value, first, last, at, dim, factor, sums);
}

using Mix = void (*)(const float*, const uint16_t* const*, int64_t, int64_t, int64_t, const float*, float*);
constexpr Mix kMix[kMixRows] = {mix<1>, mix<2>, mix<3>, mix<4>};

}  // namespace

int64_t attention_scratch_bf16(const atts_attention_params& p, int64_t) {
  return kAttentionRows * (p.heads / p.kv_heads) * (p.head_dim / 2 + p.head_dim + kChunk + 3);
}

namespace {

void attend_head(const atts_attention_params& p, int64_t b, int64_t h, int64_t first, int64_t last, float* scratch) {
  const int64_t group = p.heads / p.kv_heads, dim = p.head_dim, words = dim / 2, items = (last - first) * group;
  const int64_t begin = p.cu_q[b] + first;
  const int64_t before = p.kv_len[b] - (p.cu_q[b + 1] - begin);  // keys ahead of the first row's own
  const int64_t seen = before + last - first;
  const int64_t values = p.pages * p.page * p.kv_heads * dim;  // from a key to its value
  auto* q = reinterpret_cast<uint32_t*>(scratch);
  float* sums = scratch + items * words;
  float* scores = sums + items * dim;
  float* peak = scores + items * kChunk;
  float* norm = peak + items;
  float* factor = norm + items;
  for (int64_t row = 0; row < last - first; ++row)
    std::memcpy(q + row * group * words,
                static_cast<const uint16_t*>(p.q) + ((begin + row) * p.heads + h * group) * dim,
                static_cast<size_t>(group * dim) * sizeof(uint16_t));
  std::fill(sums, scores, 0.0f);
  std::fill(peak, norm, -__builtin_inff());
  std::fill(norm, factor, 0.0f);
  for (int64_t chunk = 0; chunk < seen; chunk += kChunk) {
    const int64_t n = std::min(kChunk, seen - chunk);
    const uint16_t *key[kChunk], *value[kChunk];
    find_keys(p, b, h, chunk, n, key);
    // What is read next, while the keys are multiplied: their values, and the next head's keys beside them.
    const int64_t beside = h + 1 < p.kv_heads ? 2 : 1;
    for (int64_t i = 0; i < n; ++i) {
      value[i] = key[i] + values;
      for (int64_t at = 0; at < dim; at += 32) _mm_prefetch(value[i] + at, _MM_HINT_T0);
      for (int64_t at = dim; at < beside * dim; at += 32) _mm_prefetch(key[i] + at, _MM_HINT_T1);
    }
    const int64_t lead = std::max<int64_t>(chunk - before, 0) * group;  // items that see none of these keys
    score(q + lead * words, items - lead, dim, key, n, scores + lead * kChunk);
    const auto visible = [&](int64_t item) { return std::min(before + item / group + 1 - chunk, n); };
    for (int64_t item = lead; item < items; ++item)
      factor[item] = weigh(scores + item * kChunk, visible(item), p.scale, peak + item, norm + item);
    for (int64_t item = lead; item < items; item += kMixRows) {
      const int64_t rows = std::min(kMixRows, items - item), shared = visible(item);
      kMix[rows - 1](scores + item * kChunk, value, 0, shared, dim, factor + item, sums + item * dim);
      const float one = 1.0f;
      for (int64_t r = item + 1; r < item + rows; ++r)
        if (visible(r) > shared) mix<1>(scores + r * kChunk, value, shared, visible(r), dim, &one, sums + r * dim);
    }
  }
  for (int64_t item = 0; item < items; ++item) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + ((begin + item / group) * p.heads + h * group + item % group) * dim;
    for (int64_t at = 0; at < dim; at += 8) store(out + at, to_bf16(load<F8>(sums + item * dim + at) / norm[item]));
  }
}

}  // namespace

void attend_bf16(const atts_attention_params& p, int64_t b, int64_t h_first, int64_t h_last, int64_t first,
                 int64_t last, float* scratch) {
  for (int64_t h = h_first; h < h_last; ++h) attend_head(p, b, h, first, last, scratch);
}

}  // namespace ATTS_ISA
}  // namespace atts
