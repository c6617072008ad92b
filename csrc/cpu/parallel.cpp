// A pool whose caller never waits for a thread that has not begun.
//
// A barrier of OpenMP waits until every thread has come by, so where other programs hold a core each of a step's hundreds of
// small regions can cost a time slice. Here the caller takes items like everybody else, closes the job when none are left,
// and waits only for those who still work on one.
#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace atts {
namespace {

constexpr int kSpins = 4000;  // some 100 us: longer than the caller's pause between two ops, shorter than anyone minds

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t items;
  int helpers;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
  }
};

// `job` lies on its caller's stack. A helper counts itself in before it reads `open`, the caller clears `open` before it
// reads the count, all in one total order: so either the helper finds nothing, or the caller waits for it.
class Pool {
 public:
  void run(Job& job) {
    const std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
    if (!mine.owns_lock()) return job.run();  // another lane has the helpers
    grow(job.helpers);
    open_.store(&job);
    turn_.fetch_add(1);
    if (sleepers_.load() > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    job.run();
    open_.store(nullptr);
    while (inside_.load() > 0) pause();
  }

 private:
  void grow(int helpers) {
    for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this, helpers_).detach();
  }

  void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; turn_.load(std::memory_order_relaxed) == seen && spin < kSpins; ++spin) pause();
      if (turn_.load() == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = turn_.load();
      inside_.fetch_add(1);
      if (Job* job = open_.load(); job != nullptr && index < job->helpers) job->run();
      inside_.fetch_sub(1);
    }
  }

  std::mutex caller_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> turn_{0};
  std::atomic<Job*> open_{nullptr};
  std::atomic<int> inside_{0}, sleepers_{0};
  int helpers_ = 0;  // guarded by caller_
};

}  // namespace

void parallel_items(int64_t items, int threads, void (*body)(void*, int64_t), void* context) {
  // Never destroyed: its threads outlive every static. A forked child has none of them and works alone.
  static Pool& pool = *new Pool;
  Job job{body, context, items, (items < threads ? static_cast<int>(items) : threads) - 1};
  if (job.helpers < 1) return job.run();
  pool.run(job);
}

}  // namespace atts
