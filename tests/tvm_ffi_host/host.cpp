// The device entry points, answered by the host forms of the same structs.
#include "atts/atts.h"

extern "C" {
int atts_gate(const atts_gate_params* params, void*) { return atts_gate_cpu(params); }
int atts_span_mean(const atts_span_mean_params* params, void*) { return atts_span_mean_cpu(params); }
int atts_score_logits(const atts_score_logits_params* params, void*) { return atts_score_logits_cpu(params); }
int atts_kv_append(const atts_kv_append_params* params, void*) { return atts_kv_append_cpu(params); }
int atts_kv_copy_pages(const atts_kv_copy_pages_params* params, void*) { return atts_kv_copy_pages_cpu(params); }
int atts_kv_gather(const atts_kv_gather_params* params, void*) { return atts_kv_gather_cpu(params); }
int atts_kv_swap(const atts_kv_swap_params* params, void*) { return atts_kv_swap_cpu(params); }
}
