// Every kernel over ragged shapes, built with the address and undefined-behaviour sanitizers: arrays are heap blocks of
// just their size, so that an access beside one is found. Exit code 0 where all results are right too.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "atts/atts.h"
#include "cpu/element.h"

extern "C" void cuda_host_seed(uint64_t seed);
extern "C" void cuda_host_memory(const void* first, uint64_t bytes, int type, int device);

namespace {

int failures = 0;
std::mt19937 source(7);

void expect(bool right, const char* what, int64_t detail) {
  if (right) return;
  std::printf("%s is wrong (%lld)\n", what, static_cast<long long>(detail));
  ++failures;
}

float random_value(float scale) { return scale * (static_cast<float>(source() % 20001) / 10000.0f - 1.0f); }

template <class Params>
Params sized() {
  Params params{};
  params.struct_size = sizeof params;
  return params;
}

template <class Element>
std::vector<typename Element::type> random_array(int64_t n, float scale) {
  std::vector<typename Element::type> made(static_cast<size_t>(n));
  for (auto& value : made) value = Element::narrow(random_value(scale));
  return made;
}

template <class Element>
void score_logits(int32_t dtype, int64_t rows, int64_t vocab, int64_t gap) {
  auto p = sized<atts_score_logits_params>();
  const int64_t stride = vocab + gap;
  auto logits = random_array<Element>((rows - 1) * stride + vocab, 8.0f);
  std::vector<int64_t> ids(static_cast<size_t>(rows)), bounds{0, 1, rows};
  for (auto& id : ids) id = static_cast<int64_t>(source()) % vocab;
  std::vector<float> logprob(ids.size()), score(2);
  std::vector<double> sum(2);
  p.logits = logits.data(), p.ids = ids.data(), p.logprob = logprob.data();
  p.cu_seqlens = bounds.data(), p.score = score.data(), p.sum = sum.data();
  p.rows = rows, p.vocab = vocab, p.logits_stride = stride, p.batch = 2, p.dtype = dtype, p.threads = 1;
  uint64_t bytes = 0;
  atts_score_logits_workspace(&p, &bytes);
  std::vector<uint64_t> room(bytes / 8 + 1);
  for (const bool shared : {false, true}) {
    if (shared && bytes == 0) continue;
    p.workspace = shared ? room.data() : nullptr, p.workspace_bytes = bytes;
    expect(atts_score_logits(&p, nullptr) == ATTS_OK, "the status of score_logits", vocab);
    for (int64_t row = 0; row < rows; ++row) {
      const auto* own = logits.data() + row * stride;
      double total = 0.0;
      for (int64_t i = 0; i < vocab; ++i) total += std::exp(static_cast<double>(Element::widen(own[i])));
      const double wanted = Element::widen(own[ids[static_cast<size_t>(row)]]) - std::log(total);
      expect(std::fabs(logprob[static_cast<size_t>(row)] - wanted) < 1e-5, "score_logits", vocab);
    }
    double all = 0.0;
    for (size_t row = 1; row < logprob.size(); ++row) all += static_cast<double>(logprob[row]);
    expect(sum[0] == static_cast<double>(logprob[0]) && sum[1] == all, "span_mean", rows);
  }
}

void gate(int64_t batch, int64_t keys, int64_t capacity) {
  auto p = sized<atts_gate_params>();
  const auto n = static_cast<size_t>(batch), k = static_cast<size_t>(keys);
  std::vector<float> score(n), ring(k * static_cast<size_t>(capacity));
  std::vector<int64_t> key(n), level(n), u(n), greater(n), ties(n), filled(n), size(k), head(k);
  std::vector<uint8_t> insert(n), takeover(n);
  std::vector<double> probability(n);
  p.score = score.data(), p.key = key.data(), p.level = level.data(), p.u = u.data(), p.insert = insert.data();
  p.ring = ring.data(), p.size = size.data(), p.head = head.data(), p.greater = greater.data(), p.ties = ties.data();
  p.n = filled.data(), p.takeover = takeover.data(), p.p = probability.data();
  p.batch = batch, p.keys = keys, p.capacity = capacity;
  uint64_t bytes = 0;
  atts_gate_workspace(&p, &bytes);
  std::vector<uint64_t> room(bytes / 8 + 1);
  if (bytes > 0) p.workspace = room.data(), p.workspace_bytes = bytes;
  for (int step = 0; step < 3; ++step) {
    for (size_t i = 0; i < n; ++i) {
      score[i] = std::round(random_value(8.0f));
      if (source() % 9 == 0) score[i] = NAN;
      key[i] = static_cast<int64_t>(source()) % keys, insert[i] = source() % 4 != 0;
      level[i] = static_cast<int64_t>(source()), u[i] = 1 + static_cast<int64_t>(source()) % ATTS_LEVEL_ONE;
    }
    auto q = p;
    auto other_ring = ring;
    auto other_size = size, other_head = head, other_greater = greater, other_ties = ties, other_n = filled;
    auto other_takeover = takeover;
    auto other_p = probability;
    q.ring = other_ring.data(), q.size = other_size.data(), q.head = other_head.data(), q.n = other_n.data();
    q.greater = other_greater.data(), q.ties = other_ties.data(), q.takeover = other_takeover.data();
    q.p = other_p.data();
    expect(atts_gate(&p, nullptr) == ATTS_OK && atts_gate_cpu(&q) == ATTS_OK, "the status of gate", capacity);
    expect(ring == other_ring && size == other_size && head == other_head, "the store of gate", capacity);
    expect(greater == other_greater && ties == other_ties && filled == other_n && takeover == other_takeover &&
               std::memcmp(probability.data(), other_p.data(), 8 * n) == 0,
           "gate", capacity);
  }
}

template <class Element>
void kv_append(int32_t dtype, int64_t kv_heads, int64_t heads, int64_t dim, int64_t gap) {
  auto p = sized<atts_kv_append_params>();
  const int64_t rows = 13, page = 4, pages = 9, width = (heads + 2 * kv_heads) * dim, stride = width + gap;
  auto fused = random_array<Element>((rows - 1) * stride + width, 2.0f);
  const auto cosine = random_array<atts::host::Float32>(rows * (dim / 2), 1.0f);
  const auto sine = random_array<atts::host::Float32>(rows * (dim / 2), 1.0f);
  auto kv = random_array<Element>(2 * pages * page * kv_heads * dim, 1.0f), other = kv;
  auto q_out = random_array<Element>(rows * heads * dim, 1.0f), other_q = q_out;
  const std::vector<int32_t> table{7, 0, 3, 1, -5, -5, 8, 2, 5}, cu_q{0, 5, 6, 13}, kv_len{9, 3, 12};
  p.k = fused.data() + heads * dim, p.v = fused.data() + (heads + kv_heads) * dim, p.kv = kv.data();
  p.block_table = table.data(), p.cu_q = cu_q.data(), p.kv_len = kv_len.data();
  p.rows = rows, p.kv_heads = kv_heads, p.head_dim = dim, p.heads = heads;
  p.k_stride = p.v_stride = stride, p.k_head_stride = p.v_head_stride = dim;
  p.slot_count = pages * page, p.page = page, p.batch = 3, p.table_width = 3, p.dtype = dtype;
  if (heads > 0) {
    p.q = fused.data(), p.q_out = q_out.data(), p.cosine = cosine.data(), p.sine = sine.data();
    p.q_stride = stride, p.q_head_stride = dim, p.q_out_stride = heads * dim, p.q_out_head_stride = dim;
  }
  auto q = p;
  q.kv = other.data(), q.q_out = heads > 0 ? other_q.data() : nullptr;
  expect(atts_kv_append(&p, nullptr) == ATTS_OK && atts_kv_append_cpu(&q) == ATTS_OK, "the status of kv_append", dim);
  expect(kv == other && q_out == other_q, "kv_append", dim);
  const std::vector<int64_t> slots{35, 0, 3, -1, 8, 2, 5, 30, 31, 32, 33, 9, 34};
  for (auto* each : {&p, &q}) {
    each->slots = slots.data(), each->block_table = each->cu_q = each->kv_len = nullptr;
    each->batch = each->table_width = 0;
  }
  expect(atts_kv_append(&p, nullptr) == ATTS_OK && atts_kv_append_cpu(&q) == ATTS_OK, "the status of kv_append", dim);
  expect(kv == other && q_out == other_q, "kv_append to slots", dim);
}

template <class Element>
void pages(int32_t dtype, int64_t layers, int64_t page, int64_t dim) {
  const int64_t count = 2, pool_pages = 5, piece = page * dim;
  auto kv = random_array<Element>(layers * 2 * pool_pages * piece, 1.0f), other = kv;
  std::vector<typename Element::type> dense(static_cast<size_t>(count * layers * 2 * piece)), other_dense, pool;
  other_dense = pool = dense;
  const std::vector<int64_t> src{0, 3}, dst{4, 1};
  const auto set = [&](auto params, void* where) {
    params.kv = where, params.layers = layers, params.pages = pool_pages, params.page = page, params.kv_heads = 1;
    params.head_dim = dim, params.count = count, params.dtype = dtype;
    return params;
  };
  auto copy = set(sized<atts_kv_copy_pages_params>(), kv.data());
  copy.src = src.data(), copy.dst = dst.data();
  auto other_copy = copy;
  other_copy.kv = other.data();
  expect(atts_kv_copy_pages(&copy, nullptr) == 0 && atts_kv_copy_pages_cpu(&other_copy) == 0, "the status", piece);
  expect(kv == other, "kv_copy_pages", piece);
  auto gather = set(sized<atts_kv_gather_params>(), kv.data());
  gather.dense = dense.data(), gather.page_ids = dst.data();
  auto other_gather = gather;
  other_gather.dense = other_dense.data();
  expect(atts_kv_gather(&gather, nullptr) == 0 && atts_kv_gather_cpu(&other_gather) == 0, "the status", piece);
  expect(dense == other_dense, "kv_gather", piece);
  gather.page_ids = src.data(), gather.scatter = 1;
  other_gather = gather;
  other_gather.kv = other.data();
  expect(atts_kv_gather(&gather, nullptr) == 0 && atts_kv_gather_cpu(&other_gather) == 0, "the status", piece);
  expect(kv == other, "kv_gather back", piece);
  cuda_host_memory(pool.data(), pool.size() * sizeof pool[0], 1, 0);
  const std::vector<int64_t> slots{1, 0};
  auto swap = set(sized<atts_kv_swap_params>(), kv.data());
  swap.host = pool.data(), swap.page_ids = dst.data(), swap.slots = slots.data(), swap.host_slots = 2, swap.to_host = 1;
  for (const uintptr_t stream : {uintptr_t{0}, uintptr_t{2}})
    expect(atts_kv_swap(&swap, reinterpret_cast<void*>(stream)) == 0, "the status", piece);
  expect(std::equal(pool.begin() + static_cast<int64_t>(pool.size()) / 2, pool.end(), dense.begin()), "kv_swap", piece);
}

template <class Element>
void all(int32_t dtype) {
  for (const int64_t vocab : {1, 7, 2051, 16385}) score_logits<Element>(dtype, 2, vocab, vocab % 2 * 5);
  for (const auto& [kv_heads, heads, dim] : {std::array<int64_t, 3>{1, 3, 16}, {2, 0, 64}, {1, 2, 6}, {2, 0, 5}})
    for (const int64_t gap : {0, 1}) kv_append<Element>(dtype, kv_heads, heads, dim, gap);
  pages<Element>(dtype, 2, 4, 16);
  pages<Element>(dtype, 1, 3, 3);
  pages<Element>(dtype, 1, 16, 520);
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 2; ++seed) {
    cuda_host_seed(seed);
    all<atts::host::Float32>(ATTS_FLOAT32);
    all<atts::host::Float16>(ATTS_FLOAT16);
    all<atts::host::Bfloat16>(ATTS_BFLOAT16);
    for (const auto& [batch, keys, capacity] :
         {std::array<int64_t, 3>{1, 1, 1}, {9, 3, 5}, {300, 2, 7}, {5, 9, 1031}, {20, 1, 2051}})
      gate(batch, keys, capacity);
  }
  return failures == 0 ? 0 : 1;
}
