// One step of a verifier, by the C library alone: three chains bring draft spans; their keys and values are appended to
// a paged cache, the spans are scored from the target's logits, and the conformal gate says which chains the target
// takes over.
//
// The model is left out: keys, values and logits are made up. Runs on a CUDA device where there is one and the library
// was built for it, else on the CPU; `verifier_step cpu` keeps it there.
#include <atts/atts.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"

namespace {

using example::Array;
using example::Place;

constexpr int64_t kChains = 3;
constexpr int64_t kVocab = 1000;
constexpr int64_t kPages = 16, kPage = 4, kTableWidth = 3;
constexpr int64_t kKvHeads = 2, kHeadDim = 8, kRow = kKvHeads * kHeadDim;
constexpr int64_t kCalibration = 100, kCapacity = 128;
constexpr double kAlpha = 0.4;

// Row bounds of the chains' spans (6, 5 and 4 tokens), tokens of each chain with its span, and the pages of them.
const std::vector<int64_t> kBounds = {0, 6, 11, 15};
const std::vector<int32_t> kBounds32 = {0, 6, 11, 15};
const std::vector<int32_t> kKvLen = {9, 5, 11};
const std::vector<int32_t> kBlockTable = {7, 2, 9, 4, 0, -1, 1, 8, 3};
constexpr int64_t kTokens = 15;

template <typename Params>
Params sized() {
  Params params{};  // fields that are not set are 0: optional arrays are absent
  params.struct_size = sizeof(Params);
  return params;
}

// The same struct goes to either form of an op.
template <typename Params>
void call(Place place, const char* name, int (*on_host)(const Params*), int (*on_device)(const Params*, void*),
          const Params& params) {
  const int status = place == Place::kHost ? on_host(&params) : on_device(&params, nullptr);
  if (status != ATTS_OK) throw std::runtime_error(std::string(name) + ": " + atts_strerror(status));
}

std::vector<float> made_up(int64_t count, double pace) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(std::sin(pace * static_cast<double>(i)));
  }
  return values;
}

// Writes the spans' keys, turned to their positions, and values to the pages that the block table names.
void append(Place place, Array<float>& cache) {
  const std::vector<float> values = made_up(kTokens * kRow, 0.3);
  std::vector<float> cosine, sine;
  for (int64_t chain = 0; chain < kChains; ++chain) {
    const int64_t rows = kBounds[chain + 1] - kBounds[chain];
    for (int64_t row = 0; row < rows; ++row) {
      const double position = static_cast<double>(kKvLen[chain] - rows + row);
      for (int64_t i = 0; i < kHeadDim / 2; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / kHeadDim);
        cosine.push_back(static_cast<float>(std::cos(angle)));
        sine.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
  Array<float> k(place, made_up(kTokens * kRow, 0.7)), v(place, values), cos(place, cosine), sin(place, sine);
  Array<int32_t> table(place, kBlockTable), cu_q(place, kBounds32), kv_len(place, kKvLen);

  auto a = sized<atts_kv_append_params>();
  a.k = k.data();
  a.v = v.data();
  a.kv = cache.data();
  a.cosine = cos.data();
  a.sine = sin.data();
  a.block_table = table.data();
  a.cu_q = cu_q.data();
  a.kv_len = kv_len.data();
  a.rows = kTokens;
  a.kv_heads = kKvHeads;
  a.head_dim = kHeadDim;
  a.k_stride = a.v_stride = kRow;
  a.k_head_stride = a.v_head_stride = kHeadDim;
  a.slot_count = kPages * kPage;
  a.page = kPage;
  a.batch = kChains;
  a.table_width = kTableWidth;
  a.dtype = ATTS_FLOAT32;
  call(place, "kv_append", atts_kv_append_cpu, atts_kv_append, a);

  // The last chain's last token is its 11th: slot 2 of the third page of its row of the block table.
  const std::vector<float> held = cache.read();
  const int64_t slot = kBlockTable[2 * kTableWidth + 2] * kPage + 2;
  const float* kept = held.data() + (kPages * kPage + slot) * kRow;
  if (std::memcmp(kept, values.data() + (kTokens - 1) * kRow, kRow * sizeof(float)) != 0) {
    throw std::runtime_error("kv_append: the last value is not where the block table says");
  }
}

// Mean negative log-likelihood of each span, in nats per token, from logits that favour its tokens less and less.
Array<float> score(Place place) {
  std::vector<int64_t> drafted;
  std::vector<float> favour(static_cast<std::size_t>(kTokens * kVocab), 0.0f);
  const float margins[kChains] = {8.0f, 6.0f, 4.5f};
  for (int64_t chain = 0; chain < kChains; ++chain) {
    for (int64_t row = kBounds[chain]; row < kBounds[chain + 1]; ++row) {
      drafted.push_back((row * 37) % kVocab);
      favour[static_cast<std::size_t>(row * kVocab + drafted.back())] = margins[chain];
    }
  }
  Array<float> logits(place, favour), logprob(place, kTokens), scores(place, kChains);
  Array<int64_t> ids(place, drafted), cu_seqlens(place, kBounds);
  Array<double> sum(place, kChains);

  auto s = sized<atts_score_logits_params>();
  s.logits = logits.data();
  s.ids = ids.data();
  s.logprob = logprob.data();
  s.cu_seqlens = cu_seqlens.data();
  s.score = scores.data();
  s.sum = sum.data();
  s.rows = kTokens;
  s.vocab = kVocab;
  s.logits_stride = kVocab;
  s.batch = kChains;
  s.dtype = ATTS_FLOAT32;
  s.threads = 1;
  uint64_t bytes = 0;
  if (const int status = atts_score_logits_workspace(&s, &bytes)) throw std::runtime_error(atts_strerror(status));
  if (place == Place::kHost) bytes = 0;
  Array<uint8_t> workspace(place, bytes);  // a serving loop keeps it from step to step
  if (bytes > 0) s.workspace = workspace.data();
  s.workspace_bytes = bytes;
  call(place, "score_logits", atts_score_logits_cpu, atts_score_logits, s);
  return scores;
}

// Compares each score with a hundred earlier ones of its key, decides, and keeps it for later spans.
void gate(Place place, Array<float>& scores) {
  std::vector<float> earlier(kCapacity, 0.0f);
  for (int64_t i = 0; i < kCalibration; ++i) earlier[i] = 0.02f * static_cast<float>(i) + 0.5f;
  const auto level = static_cast<int64_t>(std::ceil(kAlpha * static_cast<double>(ATTS_LEVEL_ONE)));
  Array<float> ring(place, earlier);
  Array<int64_t> size(place, std::vector<int64_t>{kCalibration}), head(place, std::vector<int64_t>{kCalibration});
  Array<int64_t> key(place, kChains), levels(place, std::vector<int64_t>(kChains, level));
  Array<int64_t> u(place, std::vector<int64_t>(kChains, ATTS_LEVEL_ONE));  // ties are not randomised
  Array<int64_t> greater(place, kChains), ties(place, kChains), n(place, kChains);
  Array<uint8_t> insert(place, std::vector<uint8_t>(kChains, 1)), takeover(place, kChains);
  Array<double> p(place, kChains);

  auto g = sized<atts_gate_params>();
  g.score = scores.data();
  g.key = key.data();
  g.level = levels.data();
  g.u = u.data();
  g.insert = insert.data();
  g.ring = ring.data();
  g.size = size.data();
  g.head = head.data();
  g.greater = greater.data();
  g.ties = ties.data();
  g.n = n.data();
  g.takeover = takeover.data();
  g.p = p.data();
  g.batch = kChains;
  g.keys = 1;
  g.capacity = kCapacity;
  call(place, "gate", atts_gate_cpu, atts_gate, g);

  const auto score_of = scores.read();
  const auto greater_of = greater.read(), n_of = n.read();
  const auto p_of = p.read();
  const auto takeover_of = takeover.read();
  std::printf("chain  tokens  score   above   of      p  verdict\n");
  for (int64_t chain = 0; chain < kChains; ++chain) {
    std::printf("%5d  %6d  %5.3f  %6d  %3d  %5.3f  %s\n", static_cast<int>(chain),
                static_cast<int>(kBounds[chain + 1] - kBounds[chain]), score_of[chain],
                static_cast<int>(greater_of[chain]), static_cast<int>(n_of[chain]), p_of[chain],
                takeover_of[chain] ? "the target takes over" : "the draft goes on");
  }
  std::printf("takeover where p <= %.1f; the store holds %d scores now\n", kAlpha, static_cast<int>(size.read()[0]));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (atts_version() / 100 != ATTS_VERSION / 100) throw std::runtime_error("the library's ABI is not the header's");
    const bool keep = argc > 1 && std::strcmp(argv[1], "cpu") == 0;
    const Place place = !keep && atts_has_cuda() && example::has_cuda_device() ? Place::kCuda : Place::kHost;
    std::printf("atts %d.%d.%d on %s\n", atts_version() / 10000, atts_version() / 100 % 100, atts_version() % 100,
                place == Place::kCuda ? "a CUDA device" : "the CPU");
    Array<float> cache(place, 2 * kPages * kPage * kRow);
    append(place, cache);
    Array<float> scores = score(place);
    gate(place, scores);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "verifier_step: %s\n", error.what());
    return 1;
  }
  return 0;
}
