// Work shared among threads. Included by the files that are compiled once only.
#ifndef ATTS_CPU_PARALLEL_H_
#define ATTS_CPU_PARALLEL_H_

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace atts {

// body(i) for i in 0 .. items-1, each once, on up to `threads` threads. The OpenMP runtime of the process runs them where it
// has one: a second pool of threads would fight with it for the cores.
template <class Body>
void parallel(int64_t items, int threads, Body body) {
  struct Job {
    Body* body;
    int64_t items;
    std::atomic<int64_t> next{0};
    static void work(void* argument) {
      Job& job = *static_cast<Job*>(argument);
      for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) (*job.body)(i);
    }
  } job;
  job.body = &body;
  job.items = items;
  if (items < threads) threads = static_cast<int>(items);
  if (threads <= 1) return Job::work(&job);
  using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const Region region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (region != nullptr) return region(Job::work, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(Job::work, &job);
  Job::work(&job);
  for (std::thread& other : others) other.join();
}

// Memory of the calling thread that lasts from call to call: fresh pages cost more than the arithmetic.
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> held;
  if (static_cast<int64_t>(held.size()) < floats) held.resize(static_cast<size_t>(floats));
  return held.data();
}

}  // namespace atts

#endif  // ATTS_CPU_PARALLEL_H_
