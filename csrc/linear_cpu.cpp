// Dense layer on the host for weights of 16 bits: read once as they are, widened in registers, summed in fp32.
//
// A row's bits depend on its own input and the weights alone. Every dot product runs over eight partial sums in index
// order, whichever rows and columns share its tile, so tiles, batches and threads cannot move a bit.
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "atts/atts.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ATTS_X86 1
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 8;
constexpr int kColumns = 4;       // weight rows of a tile
constexpr int kRows = 3;          // input rows of a tile: 4 x 3 sums and their operands fill the 16 vector registers
constexpr int64_t kBlock = 32;    // weight rows handed to a thread at a time

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // to nearest, ties to even
}

struct Job {
  const float* x;  // [rows, in]
  const uint16_t* weight;
  const uint16_t* bias;
  uint16_t* out;
  int64_t rows, in, out_features;
  std::atomic<int64_t> next{0};
};

void store(const Job& job, int64_t row, int64_t column, float sum) {
  if (job.bias != nullptr) sum += from_bf16(job.bias[column]);
  job.out[row * job.out_features + column] = to_bf16(sum);
}

// The same order of additions as the vector form: lanes pairwise, then the tail.
float total(const float* lane, const Job& job, int64_t row, int64_t column, int64_t done) {
  float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  for (int64_t k = done; k < job.in; ++k)
    sum += job.x[row * job.in + k] * from_bf16(job.weight[column * job.in + k]);
  return sum;
}

void columns_plain(const Job& job, int64_t first, int64_t last) {
  const int64_t whole = job.in / kLanes * kLanes;
  for (int64_t column = first; column < last; ++column) {
    for (int64_t row = 0; row < job.rows; ++row) {
      float lane[kLanes] = {};
      const float* x = job.x + row * job.in;
      const uint16_t* w = job.weight + column * job.in;
      for (int64_t k = 0; k < whole; k += kLanes)
        for (int l = 0; l < kLanes; ++l) lane[l] += x[k + l] * from_bf16(w[k + l]);
      store(job, row, column, total(lane, job, row, column, whole));
    }
  }
}

#ifdef ATTS_X86
template <int R, int C>
__attribute__((target("avx2,fma"))) void tile_avx2(const Job& job, int64_t row, int64_t column) {
  const int64_t whole = job.in / kLanes * kLanes;
  __m256 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
  const float* x = job.x + row * job.in;
  const uint16_t* w = job.weight + column * job.in;
  for (int64_t k = 0; k < whole; k += kLanes) {
    __m256 in[R];
    for (int r = 0; r < R; ++r) in[r] = _mm256_loadu_ps(x + r * job.in + k);
    for (int c = 0; c < C; ++c) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + c * job.in + k));
      const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      for (int r = 0; r < R; ++r) sum[r][c] = _mm256_fmadd_ps(in[r], wide, sum[r][c]);
    }
  }
  alignas(32) float lane[kLanes];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      _mm256_store_ps(lane, sum[r][c]);
      store(job, row + r, column + c, total(lane, job, row + r, column + c, whole));
    }
  }
}

template <int C>
void rows_avx2(const Job& job, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= job.rows; row += kRows) tile_avx2<kRows, C>(job, row, column);
  if (job.rows - row == 2) tile_avx2<2, C>(job, row, column);
  if (job.rows - row == 1) tile_avx2<1, C>(job, row, column);
}

void columns_avx2(const Job& job, int64_t first, int64_t last) {
  int64_t column = first;
  for (; column + kColumns <= last; column += kColumns) rows_avx2<kColumns>(job, column);
  for (; column < last; ++column) rows_avx2<1>(job, column);
}
#endif

using Columns = void (*)(const Job&, int64_t, int64_t);

Columns columns_of_this_machine() {
#ifdef ATTS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return columns_avx2;
#endif
  return columns_plain;
}

void work(void* argument) {
  static const Columns columns = columns_of_this_machine();
  Job& job = *static_cast<Job*>(argument);
  for (int64_t first; (first = job.next.fetch_add(kBlock, std::memory_order_relaxed)) < job.out_features;)
    columns(job, first, first + kBlock < job.out_features ? first + kBlock : job.out_features);
}

// The OpenMP runtime of the process where it has one: a second pool of threads would fight with it for the cores.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

void run(Job& job, int threads) {
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads <= 1) return work(&job);
  if (parallel != nullptr) return parallel(work, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, &job);
  work(&job);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" int atts_linear_cpu(const atts_linear_params* params) {
  if (params == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (params->struct_size != sizeof(atts_linear_params)) return ATTS_ERROR_ABI;
  if (params->rows < 0 || params->in_features < 1 || params->out_features < 1 || params->threads < 1)
    return ATTS_ERROR_SHAPE;
  if (params->rows == 0) return ATTS_OK;
  if (params->x == nullptr || params->weight == nullptr || params->out == nullptr) return ATTS_ERROR_NULL_POINTER;
  const int64_t values = params->rows * params->in_features;
  thread_local std::vector<float> wide;
  wide.resize(static_cast<size_t>(values));
  for (int64_t i = 0; i < values; ++i) wide[static_cast<size_t>(i)] = from_bf16(params->x[i]);
  Job job;
  job.x = wide.data();
  job.weight = params->weight;
  job.bias = params->bias;
  job.out = params->out;
  job.rows = params->rows;
  job.in = params->in_features;
  job.out_features = params->out_features;
  run(job, params->threads);
  return ATTS_OK;
}
