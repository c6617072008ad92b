// The paged cache on the host: append, copy, gather, swap.
#include <cstring>
#include <vector>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/element.h"

namespace atts {
namespace {

using namespace host;

atts_status check_ids(const int64_t* ids, int64_t count, int64_t limit, int64_t first = 0) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < first || ids[i] >= limit) return ATTS_ERROR_KEY;
  return ATTS_OK;
}

// Marks ids, which are in range; false where one was marked before.
bool mark(std::vector<bool>& marks, const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (marks[static_cast<size_t>(ids[i])]) return false;
    marks[static_cast<size_t>(ids[i])] = true;
  }
  return true;
}

atts_status check_written_once(const int64_t* ids, int64_t count, int64_t limit) {
  std::vector<bool> marks(static_cast<size_t>(limit));
  return mark(marks, ids, count) ? ATTS_OK : ATTS_ERROR_OVERLAP;
}

// to and from step over whole pages: the page of plane l is at base + l * plane_bytes.
struct Side {
  char* base;
  int64_t page_step, plane_step;  // bytes
  char* at(int64_t page, int64_t plane) const { return base + page * page_step + plane * plane_step; }
};

Side paged(const Pool& pool, void* kv) {
  return {static_cast<char*>(kv), pool.page_bytes, pool.pages * pool.page_bytes};
}

Side piled(const Pool& pool, void* dense) {
  return {static_cast<char*>(dense), pool.planes * pool.page_bytes, pool.page_bytes};
}

void copy_page(const Pool& pool, const Side& to, int64_t to_page, const Side& from, int64_t from_page) {
  for (int64_t plane = 0; plane < pool.planes; ++plane)
    std::memcpy(to.at(to_page, plane), from.at(from_page, plane), static_cast<size_t>(pool.page_bytes));
}

atts_status check_append_batch(const atts_kv_append_params& p) {
  if (p.cu_q[0] != 0 || p.cu_q[p.batch] != p.rows) return ATTS_ERROR_BATCH;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = p.cu_q[b + 1] - static_cast<int64_t>(p.cu_q[b]), length = p.kv_len[b];
    if (rows < 0 || rows > length || length > p.table_width * p.page) return ATTS_ERROR_BATCH;
    if (rows == 0) continue;
    for (int64_t i = (length - rows) / p.page; i * p.page < length; ++i) {
      const int32_t page = p.block_table[b * p.table_width + i];
      if (page < 0 || page >= p.slot_count / p.page) return ATTS_ERROR_KEY;
    }
  }
  return ATTS_OK;
}

// One head, turned where there is a table; `to` may be `from`.
template <class Element>
void write_head(const typename Element::type* from, typename Element::type* to, int64_t head_dim, const float* cosine,
                const float* sine) {
  if (cosine == nullptr) {
    std::memmove(to, from, static_cast<size_t>(head_dim) * sizeof *to);
    return;
  }
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = Element::widen(from[i]), high = Element::widen(from[half + i]);
    to[i] = Element::narrow(low * cosine[i] - high * sine[i]);
    to[half + i] = Element::narrow(high * cosine[i] + low * sine[i]);
  }
}

template <class Element>
void append_row(const atts_kv_append_params& p, int64_t row, int64_t slot) {
  using T = typename Element::type;
  const float* cosine = p.cosine == nullptr ? nullptr : p.cosine + row * (p.head_dim / 2);
  const float* sine = p.sine == nullptr ? nullptr : p.sine + row * (p.head_dim / 2);
  T* keys = static_cast<T*>(p.kv) + slot * p.kv_heads * p.head_dim;
  T* values = keys + p.slot_count * p.kv_heads * p.head_dim;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const T* k = static_cast<const T*>(p.k) + row * p.k_stride + head * p.k_head_stride;
    const T* v = static_cast<const T*>(p.v) + row * p.v_stride + head * p.v_head_stride;
    write_head<Element>(k, keys + head * p.head_dim, p.head_dim, cosine, sine);
    write_head<Element>(v, values + head * p.head_dim, p.head_dim, nullptr, nullptr);
  }
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* q = static_cast<const T*>(p.q) + row * p.q_stride + head * p.q_head_stride;
    T* out = static_cast<T*>(p.q_out) + row * p.q_out_stride + head * p.q_out_head_stride;
    write_head<Element>(q, out, p.head_dim, cosine, sine);
  }
}

}  // namespace
}  // namespace atts

extern "C" int atts_kv_append_cpu(const atts_kv_append_params* params) {
  if (const atts_status status = atts::check_kv_append(params)) return status;
  atts_kv_append_params p = *params;
  // Heads that lie side by side and are not turned are as good as one: one copy of each row.
  if (p.cosine == nullptr && p.k_head_stride == p.head_dim && p.v_head_stride == p.head_dim)
    p.head_dim *= p.kv_heads, p.kv_heads = 1;
  if (p.rows == 0) return ATTS_OK;
  const atts_status slots =
      p.slots ? atts::check_ids(p.slots, p.rows, p.slot_count, -1) : atts::check_append_batch(p);
  if (slots) return slots;
  atts::host::with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    for (int64_t row = 0; p.slots != nullptr && row < p.rows; ++row)
      if (p.slots[row] >= 0) atts::append_row<Element>(p, row, p.slots[row]);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t row = p.cu_q[b]; row < p.cu_q[b + 1]; ++row) {
        const int64_t token = p.kv_len[b] - (p.cu_q[b + 1] - row);
        const int64_t page = p.block_table[b * p.table_width + token / p.page];
        atts::append_row<Element>(p, row, page * p.page + token % p.page);
      }
    }
  });
  return ATTS_OK;
}

extern "C" int atts_kv_copy_pages_cpu(const atts_kv_copy_pages_params* params) {
  if (const atts_status status = atts::check_kv_copy_pages(params)) return status;
  const atts_kv_copy_pages_params& p = *params;
  for (const int64_t* ids : {p.src, p.dst})
    if (const atts_status status = atts::check_ids(ids, p.count, p.pages)) return status;
  std::vector<bool> written(static_cast<size_t>(p.pages));
  if (!atts::mark(written, p.dst, p.count)) return ATTS_ERROR_OVERLAP;
  for (int64_t i = 0; i < p.count; ++i)
    if (written[static_cast<size_t>(p.src[i])]) return ATTS_ERROR_OVERLAP;
  const atts::Pool pool = atts::pool_of(p);
  const atts::Side kv = atts::paged(pool, p.kv);
  for (int64_t i = 0; i < p.count; ++i) atts::copy_page(pool, kv, p.dst[i], kv, p.src[i]);
  return ATTS_OK;
}

extern "C" int atts_kv_gather_cpu(const atts_kv_gather_params* params) {
  if (const atts_status status = atts::check_kv_gather(params)) return status;
  const atts_kv_gather_params& p = *params;
  if (const atts_status status = atts::check_ids(p.page_ids, p.count, p.pages)) return status;
  if (p.scatter)
    if (const atts_status status = atts::check_written_once(p.page_ids, p.count, p.pages)) return status;
  const atts::Pool pool = atts::pool_of(p);
  const atts::Side kv = atts::paged(pool, p.kv), dense = atts::piled(pool, p.dense);
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.scatter) atts::copy_page(pool, kv, p.page_ids[i], dense, i);
    else atts::copy_page(pool, dense, i, kv, p.page_ids[i]);
  }
  return ATTS_OK;
}

extern "C" int atts_kv_swap_cpu(const atts_kv_swap_params* params) {
  if (const atts_status status = atts::check_kv_swap(params)) return status;
  const atts_kv_swap_params& p = *params;
  const atts_status once = p.to_host ? atts::check_written_once(p.slots, p.count, p.host_slots)
                                     : atts::check_written_once(p.page_ids, p.count, p.pages);
  if (once) return once;
  const atts::Pool pool = atts::pool_of(p);
  const atts::Side kv = atts::paged(pool, p.kv), host = atts::piled(pool, p.host);
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.to_host) atts::copy_page(pool, host, p.slots[i], kv, p.page_ids[i]);
    else atts::copy_page(pool, kv, p.page_ids[i], host, p.slots[i]);
  }
  return ATTS_OK;
}
