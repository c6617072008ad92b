#include "atts/atts.h"
#include "plan.h"

extern "C" int atts_gate_workspace(const atts_gate_params* params, uint64_t* bytes) {
  if (const atts_status status = atts::check_struct(params)) return status;
  if (bytes == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (const atts_status status = atts::check_gate_sizes(*params)) return status;
  *bytes = static_cast<uint64_t>(atts::gate_workspace(params->batch, params->keys, params->capacity));
  return ATTS_OK;
}

extern "C" int atts_score_logits_workspace(const atts_score_logits_params* params, uint64_t* bytes) {
  if (const atts_status status = atts::check_struct(params)) return status;
  if (bytes == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (const atts_status status = atts::check_score_logits_sizes(*params)) return status;
  const int64_t needed = atts::score_workspace(params->rows, params->vocab, params->dtype);
  if (needed < 0) return ATTS_ERROR_SHAPE;
  *bytes = static_cast<uint64_t>(needed);
  return ATTS_OK;
}
