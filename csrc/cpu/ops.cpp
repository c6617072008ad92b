// Work of the ops cut for the threads.
#include "cpu/ops.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace atts {
namespace {

constexpr int64_t kColumns = 128;             // weight rows handed to a thread at a time, at most
constexpr int64_t kShares = 4;                // of them for each thread, at least
constexpr int64_t kRows = 256;                // input rows whose results lie in a thread's scratch
constexpr int64_t kSerialProducts = 1 << 17;  // multiplications that a thread does in the time of handing some over

// Weight rows of a thread's share: large, for what one block leaves the next to read on; many, so that no thread waits long.
int64_t columns_of(int64_t all, int64_t threads) {
  const int64_t even = (all / (kShares * threads) + 31) / 32 * 32;
  return std::clamp<int64_t>(even, 32, kColumns);
}

}  // namespace

const float* prepared(const uint16_t* x, int64_t rows, int64_t n) {
  thread_local std::vector<float> held;
  held.resize(static_cast<size_t>(rows * n));
  kernels().prepare(x, rows, n, held.data());
  return held.data();
}

void dot(const float* x, int64_t rows, const uint16_t* weight, const void* packed, int64_t first, int64_t columns,
         int64_t n, float* out, int64_t out_stride) {
  const Kernels& run = kernels();
  if (packed == nullptr) return run.bf16.dot(x, rows, weight + first * n, columns, n, out, out_stride);
  const auto& matrix = *static_cast<const PackedMatrix*>(packed);
  if (run.dot_packed != nullptr) return run.dot_packed(x, rows, matrix, first, columns, out, out_stride);
  thread_local std::vector<uint16_t> held;
  held.resize(static_cast<size_t>(columns * n));
  for (int64_t c = 0; c < columns; c += kPackedColumns) unpack_columns(matrix, first + c, held.data() + c * n);
  run.bf16.dot(x, rows, held.data(), columns, n, out, out_stride);
}

void dot(const float* x, int64_t rows, const float* weight, const void*, int64_t first, int64_t columns, int64_t n,
         float* out, int64_t out_stride) {
  kernels().fp32.dot(x, rows, weight + first * n, columns, n, out, out_stride);
}

atts_status check_packed(const void* packed, int32_t dtype, int64_t out_features, int64_t in_features) {
  if (packed == nullptr) return ATTS_OK;
  if (dtype != ATTS_BFLOAT16) return ATTS_ERROR_PACKED;
  if (reinterpret_cast<uintptr_t>(packed) % 64) return ATTS_ERROR_ALIGNMENT;
  return is_packed(packed, out_features, in_features) ? ATTS_OK : ATTS_ERROR_PACKED;
}

void linear(const atts_linear_params& p) {
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* weight = static_cast<const T*>(p.weight);
    const auto* bias = static_cast<const T*>(p.bias);
    auto* out = static_cast<T*>(p.out);
    const float* x = prepared(static_cast<const T*>(p.x), p.rows, p.in_features);
    const bool serial = p.rows * p.in_features * p.out_features < kSerialProducts;
    const int threads = serial ? 1 : p.threads;
    const int64_t width = columns_of(p.out_features, threads);
    parallel((p.out_features + width - 1) / width, threads, [&](int64_t block) {
      const int64_t first = block * width, columns = std::min(p.out_features - first, width);
      float* sums = scratch(kRows * kColumns);
      for (int64_t at = 0; at < p.rows; at += kRows) {
        const int64_t rows = std::min(p.rows - at, kRows);
        dot(x + at * p.in_features, rows, weight, p.packed, first, columns, p.in_features, sums, kColumns);
        for (int64_t row = 0; row < rows; ++row)
          kernels().of<T>().narrow(sums + row * kColumns, bias == nullptr ? nullptr : bias + first, columns,
                                   out + (at + row) * p.out_features + first);
      }
    });
  });
}

void rms_norm(const atts_rms_norm_params& p) {
  with_type(p.dtype, [&](auto element) {
    const auto run = kernels().of<decltype(element)>().rms_norm;
    parallel_rows(p.rows, p.width, p.threads, [&](int64_t first, int64_t last) { run(p, first, last); });
  });
}

void silu_mul(const atts_silu_mul_params& p) {
  with_type(p.dtype, [&](auto element) {
    const auto run = kernels().of<decltype(element)>().silu_mul;
    parallel_rows(p.rows, p.width, p.threads, [&](int64_t first, int64_t last) { run(p, first, last); });
  });
}

void rope(const atts_rope_params& p) {
  with_type(p.dtype, [&](auto element) {
    const auto run = kernels().of<decltype(element)>().rope;
    parallel_rows(p.rows, p.heads * p.head_dim, p.threads, [&](int64_t first, int64_t last) { run(p, first, last); });
  });
}

atts_status check_attention_batch(const atts_attention_params& p) {
  if (p.cu_q[0] != 0 || p.cu_q[p.batch] != p.rows) return ATTS_ERROR_BATCH;
  if (p.rows == 0) return ATTS_OK;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = p.cu_q[b + 1] - static_cast<int64_t>(p.cu_q[b]), length = p.kv_len[b];
    if (rows < 0 || rows > length || length > p.table_width * p.page) return ATTS_ERROR_BATCH;
    for (int64_t i = 0; rows > 0 && i * p.page < length; ++i) {
      const int32_t page = p.block_table[b * p.table_width + i];
      if (page < 0 || page >= p.pages) return ATTS_ERROR_BATCH;
    }
  }
  return ATTS_OK;
}

void attention(const atts_attention_params& p) {
  struct Unit {
    int64_t sequence, first, last;
  };
  std::vector<Unit> units;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = p.cu_q[b + 1] - p.cu_q[b];
    if (rows > 0) longest = std::max<int64_t>(longest, p.kv_len[b]);
    for (int64_t first = 0; first < rows; first += kAttentionRows)
      units.push_back({b, first, std::min(first + kAttentionRows, rows)});
  }
  with_type(p.dtype, [&](auto element) {
    const auto& run = kernels().of<decltype(element)>();
    const int64_t floats = run.attention_scratch(p, longest);
    // A thread that has all heads of a unit finds the next head's keys in the lines beside the last one's.
    const auto all = static_cast<int64_t>(units.size()), apart = all < 4 * p.threads ? p.kv_heads : 1;
    parallel(all * apart, p.threads, [&](int64_t i) {
      const Unit& unit = units[static_cast<size_t>(i / apart)];
      const int64_t heads = p.kv_heads / apart, h = i % apart * heads;
      run.attend(p, unit.sequence, h, h + heads, unit.first, unit.last, scratch(floats));
    });
  });
}

}  // namespace atts
