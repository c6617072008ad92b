#include "cuda/kv_append.cuh"

#include "checks.h"
#include "cuda/launch.h"

namespace atts {
namespace {

// Whether every vector of a [rows, heads, ...] array starts on 16 bytes.
bool vectors(const void* pointer, int64_t rows, int64_t heads, int64_t row_stride, int64_t head_stride, int64_t bytes) {
  return aligned(pointer, kVectorBytes) && (rows <= 1 || row_stride * bytes % kVectorBytes == 0) &&
         (heads <= 1 || head_stride * bytes % kVectorBytes == 0);
}

bool all_vectors(const atts_kv_append_params& p, int64_t bytes) {
  const int64_t run = p.cosine == nullptr ? p.head_dim : p.head_dim / 2;
  return run * bytes % kVectorBytes == 0 && aligned(p.kv, kVectorBytes) && aligned(p.cosine, kVectorBytes) &&
         aligned(p.sine, kVectorBytes) && vectors(p.k, p.rows, p.kv_heads, p.k_stride, p.k_head_stride, bytes) &&
         vectors(p.v, p.rows, p.kv_heads, p.v_stride, p.v_head_stride, bytes) &&
         vectors(p.q, p.rows, p.heads, p.q_stride, p.q_head_stride, bytes) &&
         vectors(p.q_out, p.rows, p.heads, p.q_out_stride, p.q_out_head_stride, bytes);
}

template <class Element, int n>
atts_status launch_append(const atts_kv_append_params& p, void* stream) {
  const int64_t run = p.cosine == nullptr ? p.head_dim : p.head_dim / 2;
  const int64_t units = product(run / n, 2 * p.kv_heads + p.heads);
  // So that a lane's count of units stays an int.
  if (units < 0 || units > INT32_MAX / 2) return ATTS_ERROR_SHAPE;
  const int64_t wanted = (units - 1) / (kWarp * kUnitsOfLane) + 1;
  const auto parts = static_cast<unsigned>(wanted < kAppendMaxParts ? wanted : kAppendMaxParts);
  const AppendLaunch work{p, static_cast<int>(run / n), static_cast<int>(units), parts};
  if (p.rows > INT32_MAX / parts) return ATTS_ERROR_SHAPE;  // a kernel counts warps in 32 bits
  const int64_t blocks = (p.rows * parts - 1) / kAppendWarps + 1;
  const auto kernel = p.cosine == nullptr ? kv_append_kernel<Element, n, false> : kv_append_kernel<Element, n, true>;
  return launch(kernel, blocks, kAppendThreads, stream, work);
}

template <class Element>
atts_status launch_dtype(const atts_kv_append_params& p, void* stream) {
  constexpr int64_t bytes = sizeof(typename Element::type);
  return all_vectors(p, bytes) ? launch_append<Element, kVectorBytes / bytes>(p, stream)
                               : launch_append<Element, 1>(p, stream);
}

}  // namespace
}  // namespace atts

extern "C" int atts_kv_append(const atts_kv_append_params* params, void* stream) {
  if (const atts_status status = atts::check_kv_append(params)) return status;
  const atts_kv_append_params& p = *params;
  if (p.rows == 0) return ATTS_OK;
  if (p.kv_heads > INT32_MAX || p.heads > INT32_MAX) return ATTS_ERROR_SHAPE;
  if (const atts_status status = atts::check_device(p.kv)) return status;
  if (p.dtype == ATTS_FLOAT32) return atts::launch_dtype<atts::Float32>(p, stream);
  if (p.dtype == ATTS_FLOAT16) return atts::launch_dtype<atts::Float16>(p, stream);
  return atts::launch_dtype<atts::Bfloat16>(p, stream);
}
