#ifndef ATTS_CUDA_SPAN_MEAN_H_
#define ATTS_CUDA_SPAN_MEAN_H_

#include "atts/atts.h"

namespace atts {

// Checked params. `behind`: the launch ahead of it in the stream writes logprob.
atts_status launch_span_mean(const atts_span_mean_params& params, void* stream, bool behind);

}  // namespace atts

#endif  // ATTS_CUDA_SPAN_MEAN_H_
