// Work shared among threads. Included by the files that are compiled once only.
#ifndef ATTS_CPU_PARALLEL_H_
#define ATTS_CPU_PARALLEL_H_

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

// Memory of the calling thread that lasts from call to call: fresh pages cost more than the arithmetic.
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> held;
  if (static_cast<int64_t>(held.size()) < floats) held.resize(static_cast<std::size_t>(floats));
  return held.data();
}

}  // namespace atts

#endif  // ATTS_CPU_PARALLEL_H_
