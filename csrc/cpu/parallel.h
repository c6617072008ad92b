// Work shared among threads. Included by the files that are compiled once only.
#ifndef ATTS_CPU_PARALLEL_H_
#define ATTS_CPU_PARALLEL_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace atts {

void parallel_items(int64_t items, int threads, void (*body)(void*, int64_t), void* context);

// body(i) for i in 0 .. items-1, each once, on up to `threads` threads, the calling one among them.
template <class Body>
void parallel(int64_t items, int threads, Body body) {
  parallel_items(items, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

// body(first, last) for all rows in as many pieces as there are threads, or in one where they hold few values: below some
// 4 us of work, what the other thread takes is less than handing it over costs.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, int threads, Body body) {
  constexpr int64_t kSerialValues = 4096;
  const int64_t part = rows * width < kSerialValues ? rows : (rows + threads - 1) / threads;
  parallel((rows + part - 1) / part, threads, [&](int64_t i) { body(i * part, std::min((i + 1) * part, rows)); });
}

// Memory of the calling thread that lasts from call to call: fresh pages cost more than the arithmetic.
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> held;
  if (static_cast<int64_t>(held.size()) < floats) held.resize(static_cast<std::size_t>(floats));
  return held.data();
}

}  // namespace atts

#endif  // ATTS_CPU_PARALLEL_H_
