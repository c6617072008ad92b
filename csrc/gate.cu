#include "cuda/gate.cuh"

#include "cuda/launch.h"
#include "plan.h"

extern "C" int atts_has_cuda(void) { return 1; }

extern "C" int atts_gate(const atts_gate_params* params, void* stream) {
  if (const atts_status status = atts::check_gate(params)) return status;
  const atts_gate_params& g = *params;
  if (g.batch == 0) return ATTS_OK;
  atts::GateLaunch work{g, 1, nullptr, nullptr};
  const int64_t bytes = g.workspace == nullptr ? 0 : atts::gate_workspace(g.batch, g.keys, g.capacity);
  if (bytes > 0) {
    if (!atts::aligned(g.workspace, 16)) return ATTS_ERROR_ALIGNMENT;
    if (g.workspace_bytes < static_cast<uint64_t>(bytes)) return ATTS_ERROR_WORKSPACE;
    work.splits = static_cast<unsigned>(atts::gate_splits(g.batch, g.keys, g.capacity));
    work.counts = static_cast<unsigned long long*>(g.workspace);
    work.tickets = reinterpret_cast<uint32_t*>(work.counts + g.batch);
  }
  if (const atts_status status = atts::check_device(g.ring)) return status;
  const int64_t blocks = atts::gate_owners(g.batch, g.keys) * work.splits;
  return atts::launch(atts::gate_kernel, blocks, atts::kGateThreads, stream, work);
}
