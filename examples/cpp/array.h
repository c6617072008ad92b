// An array in host memory, or in memory of the current CUDA device where the example was built with the CUDA runtime.
#ifndef EXAMPLE_ARRAY_H_
#define EXAMPLE_ARRAY_H_

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#ifdef EXAMPLE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace example {

enum class Place { kHost, kCuda };

#ifdef EXAMPLE_WITH_CUDA
inline void require(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}
inline bool has_cuda_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline void* allocate(Place place, std::size_t bytes) {
  if (place == Place::kHost) return ::operator new(bytes);
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(Place place, void* memory) {
  if (place == Place::kHost) {
    ::operator delete(memory);
  } else {
    cudaFree(memory);
  }
}
inline void copy(Place place, void* to, const void* from, std::size_t bytes) {
  if (place == Place::kHost) {
    std::memcpy(to, from, bytes);
  } else {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  }
}
#else
inline bool has_cuda_device() { return false; }
inline void* allocate(Place, std::size_t bytes) { return ::operator new(bytes); }
inline void release(Place, void* memory) { ::operator delete(memory); }
inline void copy(Place, void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
#endif

template <typename T>
class Array {
 public:
  Array(Place place, const std::vector<T>& values)
      : size_(values.size()), data_(static_cast<T*>(allocate(place, bytes())), Release{place}) {
    if (size_ > 0) copy(place, data(), values.data(), bytes());
  }
  // So many zeros.
  Array(Place place, std::size_t size) : Array(place, std::vector<T>(size)) {}

  T* data() { return data_.get(); }
  std::size_t bytes() const { return size_ * sizeof(T); }

  // A copy on the host; on a device it waits for the launches before it.
  std::vector<T> read() const {
    std::vector<T> values(size_);
    if (size_ > 0) copy(data_.get_deleter().place, values.data(), data_.get(), bytes());
    return values;
  }

 private:
  struct Release {
    Place place;
    void operator()(T* memory) const { release(place, memory); }
  };
  std::size_t size_;
  std::unique_ptr<T, Release> data_;
};

}  // namespace example

#endif  // EXAMPLE_ARRAY_H_
