// The device entry points of a library that was built without CUDA.
#include "atts/atts.h"

extern "C" {
int atts_has_cuda(void) { return 0; }
int atts_gate(const atts_gate_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_span_mean(const atts_span_mean_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_score_logits(const atts_score_logits_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_kv_append(const atts_kv_append_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_kv_copy_pages(const atts_kv_copy_pages_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_kv_gather(const atts_kv_gather_params*, void*) { return ATTS_ERROR_NO_CUDA; }
int atts_kv_swap(const atts_kv_swap_params*, void*) { return ATTS_ERROR_NO_CUDA; }
}
