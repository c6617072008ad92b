#include <cmath>
#include <limits>

#include "atts/atts.h"
#include "checks.h"

namespace {

atts_status check_values(const atts_gate_params& g) {
  for (int64_t row = 0; row < g.batch; ++row) {
    if (g.key[row] < 0 || g.key[row] >= g.keys) return ATTS_ERROR_KEY;
    if (g.level[row] < 0 || g.level[row] > ATTS_LEVEL_ONE) return ATTS_ERROR_VALUE;
    if (g.u[row] < 1 || g.u[row] > ATTS_LEVEL_ONE) return ATTS_ERROR_VALUE;
    const int64_t key = g.key[row];
    if (g.size[key] < 0 || g.size[key] > g.capacity) return ATTS_ERROR_STORE;
    if (g.head[key] < 0 || g.head[key] >= g.capacity) return ATTS_ERROR_STORE;
  }
  return ATTS_OK;
}

void decide(const atts_gate_params& g, int64_t row) {
  const int64_t n = g.size[g.key[row]];
  const float score = g.score[row];
  g.n[row] = n;
  if (!std::isfinite(score)) {
    g.greater[row] = -1;
    g.ties[row] = 0;
    g.takeover[row] = 0;
    g.p[row] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const float* ring = g.ring + g.key[row] * g.capacity;
  int64_t greater = 0;
  int64_t ties = 0;
  for (int64_t i = 0; i < n; ++i) {
    greater += ring[i] > score;
    ties += ring[i] == score;
  }
  g.greater[row] = greater;
  g.ties[row] = ties;
  g.takeover[row] = greater * ATTS_LEVEL_ONE + g.u[row] * (1 + ties) <= g.level[row] * (n + 1);
  const double share = static_cast<double>(g.u[row]) / static_cast<double>(ATTS_LEVEL_ONE);
  // Built without contraction: a fused multiply-add would move the last bit against the other implementations.
  const double random_part = share * static_cast<double>(1 + ties);
  g.p[row] = (static_cast<double>(greater) + random_part) / static_cast<double>(n + 1);
}

void insert(const atts_gate_params& g, int64_t row) {
  if (!g.insert[row] || !std::isfinite(g.score[row])) return;
  const int64_t key = g.key[row];
  g.ring[key * g.capacity + g.head[key]] = g.score[row];
  g.head[key] = (g.head[key] + 1) % g.capacity;
  if (g.size[key] < g.capacity) ++g.size[key];
}

}  // namespace

extern "C" int atts_gate_cpu(const atts_gate_params* params) {
  if (const atts_status status = atts::check_gate(params)) return status;
  if (const atts_status status = check_values(*params)) return status;
  for (int64_t row = 0; row < params->batch; ++row) decide(*params, row);
  for (int64_t row = 0; row < params->batch; ++row) insert(*params, row);
  return ATTS_OK;
}
