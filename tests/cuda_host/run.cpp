// Runs the grids of the host's CUDA, and stands in for its runtime. See include/cuda_runtime.h.
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda.h"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// A fiber that ended, or was given up, left frames behind.
#define STACK_STARTS(bottom, size) __asan_unpoison_memory_region(bottom, size)
#define SWITCH_STARTS(saved, bottom, size) __sanitizer_start_switch_fiber(saved, bottom, size)
#define SWITCH_ENDED(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define STACK_STARTS(bottom, size) (void)(bottom), (void)(size)
#define SWITCH_STARTS(saved, bottom, size) (void)(bottom), (void)(size)
#define SWITCH_ENDED(saved, bottom, size) (void)(bottom), (void)(size)
// The section of shared variables, where there are any.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[], __stop_cuda_shared[];
#endif

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr int kLanes = 32;

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  [[maybe_unused]] void* sanitizer = nullptr;
  State state = State::kReady;
  uint3 thread{};
  Collective what = Collective::kSync;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0;
};

std::mt19937_64 random_source;
std::string failure;

// The shared variables of the block that is running; of the others their Block holds a copy.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kMostBlocks = 1;  // shared variables are no section then, and cannot be put aside
char* shared_memory() { return nullptr; }
size_t shared_bytes() { return 0; }
#else
constexpr size_t kMostBlocks = 3;
char* shared_memory() { return __start_cuda_shared; }
size_t shared_bytes() {
  return __start_cuda_shared == nullptr ? 0 : static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared);
}
#endif

class Block {
 public:
  enum class Progress { kGoesOn, kEnded, kStuck };

  void begin(dim3 size, unsigned index, const std::function<void()>& body) {
    body_ = &body;
    index_ = {index, 0, 0};
    threads_ = static_cast<int>(size.x);
    while (static_cast<int>(fibers_.size()) < threads_) fibers_.push_back(std::make_unique<Fiber>());
    for (int t = 0; t < threads_; ++t) begin_fiber(*fibers_[t], static_cast<unsigned>(t));
    shared_.assign(shared_bytes(), static_cast<char>(0xa5));
  }

  // One warp of the block goes on until a barrier stops it, and meets no other warp on the way.
  Progress step() {
    std::vector<int> ready;
    for (int w = 0; w * kLanes < threads_; ++w)
      if (has_ready_lane(w)) ready.push_back(w);
    if (ready.empty()) return release_barrier() ? Progress::kGoesOn : ended() ? Progress::kEnded : Progress::kStuck;
    running_ = this;
    if (!shared_.empty()) std::memcpy(shared_memory(), shared_.data(), shared_.size());
    const int warp = ready[random_source() % ready.size()];
    while (has_ready_lane(warp)) {
      run_lanes(warp);
      release_collectives(warp);
    }
    if (!shared_.empty()) std::memcpy(shared_.data(), shared_memory(), shared_.size());
    return Progress::kGoesOn;
  }

  int at_barrier(bool value) {
    Fiber& fiber = *current_;
    fiber.value = value;
    fiber.state = State::kAtBarrier;
    leave();
    return static_cast<int>(fiber.result);
  }

  uint64_t in_collective(Collective what, unsigned mask, uint64_t value, int argument) {
    Fiber& fiber = *current_;
    fiber.what = what, fiber.mask = mask, fiber.value = value, fiber.argument = argument;
    fiber.state = State::kInCollective;
    leave();
    return fiber.result;
  }

  static Block* running_;

 private:
  // A function of its own: getcontext counts as one that returns twice.
  static void begin_fiber(Fiber& fiber, unsigned thread) {
    STACK_STARTS(fiber.stack.get(), kStackBytes);
    fiber.state = State::kReady;
    fiber.thread = {thread, 0, 0};
    fiber.sanitizer = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  int last_of(int warp) const { return std::min(threads_, (warp + 1) * kLanes); }

  bool has_ready_lane(int warp) const {
    for (int t = warp * kLanes; t < last_of(warp); ++t)
      if (fibers_[t]->state == State::kReady) return true;
    return false;
  }

  void run_lanes(int warp) {
    int order[kLanes], n = 0;
    for (int t = warp * kLanes; t < last_of(warp); ++t) order[n++] = t;
    std::shuffle(order, order + n, random_source);
    for (int i = 0; i < n; ++i)
      if (fibers_[order[i]]->state == State::kReady) resume(*fibers_[order[i]]);
  }

  void release_collectives(int warp) {
    for (int t = warp * kLanes; t < last_of(warp); ++t) {
      const Fiber& first = *fibers_[t];
      if (first.state != State::kInCollective) continue;
      bool all = true;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(first.mask >> lane & 1u)) continue;
        const int other = warp * kLanes + lane;
        all = all && other < last_of(warp) && fibers_[other]->state == State::kInCollective &&
              fibers_[other]->mask == first.mask && fibers_[other]->what == first.what;
      }
      if (all) finish_collective(warp, first.mask, first.what);
    }
  }

  void finish_collective(int warp, unsigned mask, Collective what) {
    Fiber* lanes[kLanes] = {};
    uint64_t ballot = 0, sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      lanes[lane] = fibers_[warp * kLanes + lane].get();
      ballot |= static_cast<uint64_t>(lanes[lane]->value != 0) << lane;
      sum += lanes[lane]->value;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      Fiber* fiber = lanes[lane];
      if (fiber == nullptr) continue;
      int source = fiber->argument % kLanes;
      if (what == Collective::kShuffleXor) source = lane ^ fiber->argument;
      if (what == Collective::kBallot) fiber->result = ballot;
      else if (what == Collective::kAdd) fiber->result = sum & 0xffffffffu;
      else if (what == Collective::kSync) fiber->result = 0;
      else fiber->result = lanes[source] == nullptr ? 0xa5a5a5a5u : lanes[source]->value;
      fiber->state = State::kReady;
    }
  }

  // Threads that have ended are not waited for, as on a device.
  bool release_barrier() {
    uint64_t sum = 0;
    int waiting = 0;
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t]->state == State::kInCollective) return false;
      if (fibers_[t]->state != State::kAtBarrier) continue;
      ++waiting;
      sum += fibers_[t]->value;
    }
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t]->state != State::kAtBarrier) continue;
      fibers_[t]->result = sum;
      fibers_[t]->state = State::kReady;
    }
    return waiting > 0;
  }

  bool ended() {
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t]->state == State::kDone) continue;
      failure = "thread " + std::to_string(t) + " waits for lanes that never come";
      return false;
    }
    return true;
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.thread;
    blockIdx = index_;
    [[maybe_unused]] void* saved = nullptr;
    SWITCH_STARTS(&saved, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    SWITCH_ENDED(saved, nullptr, nullptr);
  }

  void leave() {
    Fiber& fiber = *current_;
    SWITCH_STARTS(fiber.state == State::kDone ? nullptr : &fiber.sanitizer, scheduler_bottom_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    SWITCH_ENDED(fiber.sanitizer, nullptr, nullptr);
  }

  static void enter() {
    Block& block = *running_;
    SWITCH_ENDED(nullptr, &block.scheduler_bottom_, &block.scheduler_size_);
    (*block.body_)();
    block.current_->state = State::kDone;
    block.leave();
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* body_ = nullptr;
  uint3 index_{};
  int threads_ = 0;
  std::vector<char> shared_;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

Block* Block::running_ = nullptr;
Block resident_blocks[kMostBlocks];

struct Memory {
  const char* first;
  size_t bytes;
  cudaPointerAttributes attributes;
};
std::vector<Memory> memories;

struct Counts {
  int64_t launches, behind, batches, batched, rectangles, copies;
} counts;
bool driver_has_batches = true, launches_fail = false;

CUresult copy_batch(CUdeviceptr* to, CUdeviceptr* from, size_t* sizes, size_t n, CUmemcpyAttributes* attributes,
                    size_t* first, size_t kinds, size_t*, CUstream stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || kinds != 1 || first[0] != 0 ||
      attributes[0].srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < n; ++i)
    std::memcpy(reinterpret_cast<void*>(to[i]), reinterpret_cast<const void*>(from[i]), sizes[i]);
  ++counts.batches;
  counts.batched += static_cast<int64_t>(n);
  return CUDA_SUCCESS;
}

}  // namespace

uint64_t warp_collective(Collective what, unsigned mask, uint64_t value, int argument) {
  return Block::running_->in_collective(what, mask, value, argument);
}

int block_barrier(bool value) { return Block::running_->at_barrier(value); }

bool run_grid(dim3 grid, dim3 block, bool behind, const std::function<void()>& body) {
  ++counts.launches;
  counts.behind += behind;
  if (launches_fail) return false;
  gridDim = grid, blockDim = block;
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source);
  std::vector<Block*> resident, idle;
  for (Block& each : resident_blocks) idle.push_back(&each);
  while (!order.empty() || !resident.empty()) {
    while (!order.empty() && !idle.empty()) {
      resident.push_back(idle.back());
      idle.pop_back();
      resident.back()->begin(block, order.back(), body);
      order.pop_back();
    }
    const size_t chosen = random_source() % resident.size();
    const Block::Progress progress = resident[chosen]->step();
    if (progress == Block::Progress::kStuck) return false;
    if (progress == Block::Progress::kGoesOn) continue;
    idle.push_back(resident[chosen]);
    resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(chosen));
  }
  return true;
}

}  // namespace cuda_host

using cuda_host::counts;

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Memory that no test has named belongs to device 0.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const char* at = static_cast<const char*>(pointer);
  *attributes = {cudaMemoryTypeDevice, 0};
  for (const cuda_host::Memory& memory : cuda_host::memories)
    if (at >= memory.first && at < memory.first + memory.bytes) *attributes = memory.attributes;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  ++counts.copies;
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  for (size_t i = 0; i < height; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  ++counts.rectangles;
  return cudaSuccess;
}

// A stream is a number: 2 is one of its own, 3 one that is being captured.
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == reinterpret_cast<cudaStream_t>(3) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = cuda_host::driver_has_batches && !std::strcmp(name, "cuMemcpyBatchAsync") && version == 12080;
  *entry = known ? reinterpret_cast<void*>(&cuda_host::copy_batch) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// What tests set and read.
extern "C" {
void cuda_host_seed(uint64_t seed) { cuda_host::random_source.seed(seed); }
void cuda_host_memory(const void* first, uint64_t bytes, int type, int device) {
  cuda_host::memories.push_back({static_cast<const char*>(first), bytes, {static_cast<cudaMemoryType>(type), device}});
}
void cuda_host_forget_memory(void) { cuda_host::memories.clear(); }
void cuda_host_batches(int has) { cuda_host::driver_has_batches = has != 0; }
void cuda_host_launches_fail(int fail) { cuda_host::launches_fail = fail != 0; }
void cuda_host_reset_counts(void) { counts = {}; }
void cuda_host_counts(int64_t* to) { std::memcpy(to, &counts, sizeof counts); }
const char* cuda_host_failure(void) { return cuda_host::failure.c_str(); }
}
