// What both gates can check without reading an array.
#ifndef ATTS_GATE_CHECK_H_
#define ATTS_GATE_CHECK_H_

#include "atts/atts.h"

namespace atts {

inline atts_status check_gate(const atts_gate_params* params) {
  if (params == nullptr) return ATTS_ERROR_NULL_POINTER;
  const atts_gate_params& g = *params;
  if (g.struct_size != sizeof(atts_gate_params)) return ATTS_ERROR_ABI;
  if (g.batch < 0 || g.keys < 1 || g.capacity < 1 || g.capacity > ATTS_GATE_MAX_CAPACITY) return ATTS_ERROR_SHAPE;
  if (!g.ring || !g.size || !g.head) return ATTS_ERROR_NULL_POINTER;
  if (g.batch == 0) return ATTS_OK;
  const bool inputs = g.score && g.key && g.level && g.u && g.insert;
  const bool outputs = g.greater && g.ties && g.n && g.takeover && g.p;
  return inputs && outputs ? ATTS_OK : ATTS_ERROR_NULL_POINTER;
}

}  // namespace atts

#endif  // ATTS_GATE_CHECK_H_
