#include "cuda/kv_pages.cuh"

#include "checks.h"
#include "cuda/launch.h"

namespace atts {
namespace {

PageEnd paged(const Pool& pool, void* kv, const int64_t* ids) {
  return {static_cast<char*>(kv), ids, pool.page_bytes, pool.pages * pool.page_bytes};
}

PageEnd piled(const Pool& pool, void* dense) {
  return {static_cast<char*>(dense), nullptr, pool.planes * pool.page_bytes, pool.page_bytes};
}

template <class Unit>
atts_status launch_pages(const Pool& pool, const PageEnd& from, const PageEnd& to, int64_t count, int32_t* error,
                         void* stream) {
  const int64_t units = pool.page_bytes / static_cast<int64_t>(sizeof(Unit)), chunks = (units - 1) / kPageChunk + 1;
  const int64_t blocks = product(count, pool.planes, chunks);
  if (blocks < 0 || blocks > INT32_MAX) return ATTS_ERROR_SHAPE;
  // Blocks are count * planes * chunks, so that neither factor is larger.
  const auto planes = static_cast<unsigned>(pool.planes), pieces = static_cast<unsigned>(chunks);
  const PageLaunch work{from, to, pool.pages, units, planes, pieces, error};
  return launch(kv_pages_kernel<Unit>, blocks, kPageThreads, stream, work);
}

atts_status copy_pages(const Pool& pool, const PageEnd& from, const PageEnd& to, int64_t count, int32_t* error,
                       void* stream) {
  for (const PageEnd* end : {&from, &to})
    if (const atts_status status = check_device(end->base)) return status;
  // Every dtype is a multiple of two bytes.
  return pool.page_bytes % kVectorBytes == 0 && aligned(from.base, kVectorBytes) && aligned(to.base, kVectorBytes)
             ? launch_pages<uint4>(pool, from, to, count, error, stream)
             : launch_pages<uint16_t>(pool, from, to, count, error, stream);
}

}  // namespace
}  // namespace atts

extern "C" int atts_kv_copy_pages(const atts_kv_copy_pages_params* params, void* stream) {
  if (const atts_status status = atts::check_kv_copy_pages(params)) return status;
  const atts_kv_copy_pages_params& p = *params;
  if (p.count == 0) return ATTS_OK;
  const atts::Pool pool = atts::pool_of(p);
  const atts::PageEnd from = atts::paged(pool, p.kv, p.src), to = atts::paged(pool, p.kv, p.dst);
  return atts::copy_pages(pool, from, to, p.count, p.error, stream);
}

extern "C" int atts_kv_gather(const atts_kv_gather_params* params, void* stream) {
  if (const atts_status status = atts::check_kv_gather(params)) return status;
  const atts_kv_gather_params& p = *params;
  if (p.count == 0) return ATTS_OK;
  const atts::Pool pool = atts::pool_of(p);
  const atts::PageEnd kv = atts::paged(pool, p.kv, p.page_ids), dense = atts::piled(pool, p.dense);
  return p.scatter ? atts::copy_pages(pool, dense, kv, p.count, p.error, stream)
                   : atts::copy_pages(pool, kv, dense, p.count, p.error, stream);
}
