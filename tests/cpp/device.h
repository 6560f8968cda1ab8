// Memory, launches and repetitions for tests of kernels, on a device or emulated.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "cspd/device.cuh"

namespace device {

constexpr int kSkipped = 77;

inline bool small = false;  // few and small cases, for tools that make everything slow

inline void succeed(cudaError_t error, const char* file, int line, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s:%d: %s failed: %s (%s)\n", file, line, what, cudaGetErrorName(error), cudaGetErrorString(error));
  std::exit(1);  // a device that has failed once fails from then on
}

#define SUCCEED(call) device::succeed((call), __FILE__, __LINE__, #call)

#ifdef CSPD_EMULATED

inline bool there_is_one() { return true; }
inline void synchronise() {}
inline void* allocate(std::size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
inline void release(void* at) { std::free(at); }
inline void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
inline void fill(void* at, int value, std::size_t bytes) { std::memset(at, value, bytes); }
constexpr bool kEmulated = true;

#else

inline bool there_is_one() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline void synchronise() { SUCCEED(cudaDeviceSynchronize()); }
inline void* allocate(std::size_t bytes) {
  void* at = nullptr;
  SUCCEED(cudaMalloc(&at, bytes));
  return at;
}
inline void release(void* at) { SUCCEED(cudaFree(at)); }
inline void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) SUCCEED(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void fill(void* at, int value, std::size_t bytes) { SUCCEED(cudaMemset(at, value, bytes)); }
constexpr bool kEmulated = false;

#endif

// A launch, which is to succeed, and its end.
#define RUN(call) (SUCCEED(call), device::synchronise())

// Device memory between two walls. All of it starts as NaNs (of floating types; -1 of integers): what is read without
// having been written spoils results, inside and beyond the array, and what is written beyond it shows in the walls.
template <typename T>
class Array {
 public:
  // The array starts ``offset`` values behind a boundary of 256 bytes.
  explicit Array(std::size_t count, std::size_t offset = 0) : count_(count), offset_(offset) {
    memory_ = static_cast<unsigned char*>(allocate(bytes()));
    fill(memory_, kPoison, bytes());
  }
  Array(const std::vector<T>& values, std::size_t offset = 0) : Array(values.size(), offset) { set(values); }
  Array(std::initializer_list<T> values) : Array(std::vector<T>(values)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    check_walls();
    release(memory_);
  }

  T* get() const { return reinterpret_cast<T*>(memory_ + front()); }
  std::size_t size() const { return count_; }

  void set(const std::vector<T>& values) {
    if (values.size() != count_) std::abort();
    copy(get(), values.data(), count_ * sizeof(T));
  }

  std::vector<T> host() const {
    std::vector<T> values(count_);
    copy(values.data(), get(), count_ * sizeof(T));
    return values;
  }

  bool untouched() const {
    for (const auto byte : all()) {
      if (byte != kPoison) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kPoison = 0xff;
  static constexpr std::size_t kWall = 4096;

  std::size_t front() const { return kWall + offset_ * sizeof(T); }
  std::size_t bytes() const { return front() + count_ * sizeof(T) + kWall; }

  std::vector<unsigned char> all() const {
    std::vector<unsigned char> values(bytes());
    copy(values.data(), memory_, bytes());
    return values;
  }

  void check_walls() const {
    const auto values = all();
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (i == front()) i += count_ * sizeof(T);
      const auto place = (static_cast<long>(i) - static_cast<long>(front())) / static_cast<long>(sizeof(T));
      if (values[i] == kPoison) continue;
      check::result(false, __FILE__, __LINE__,
                    "place " + check::text(place) + " of an array of " + check::text(count_) + " was written");
      return;
    }
    ++check::done;
  }

  std::size_t count_, offset_;
  unsigned char* memory_;
};

// The same bits whoever runs first: the emulation's order is drawn anew for every seed, a device's by itself.
// ``compute`` returns a vector; the first result is returned.
template <typename Compute>
auto in_any_order(const Compute& compute, int orders = 4) {
  const auto run = [&compute](int order) {
#ifdef CSPD_EMULATED
    setenv("CSPD_EMULATION_SEED", std::to_string(order).c_str(), 1);
#endif
    const check::In in("order " + check::text(order));
    return compute();
  };
  const auto first = run(0);
  for (int order = 1; order < orders; ++order) CHECK_SAME_BITS(run(order), first);
#ifdef CSPD_EMULATED
  unsetenv("CSPD_EMULATION_SEED");
#endif
  return first;
}

// A program of such tests; "small" as its argument asks for fewer cases.
template <typename Tests>
int program(const char* name, int argc, char** argv, const Tests& tests) {
  small = argc > 1 && std::string(argv[1]) == "small";
  if (!there_is_one()) {
    std::printf("%s: no CUDA device\n", name);
    return kSkipped;
  }
  tests();
  return check::finish(name);
}

}  // namespace device
