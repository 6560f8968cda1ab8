// Memory, launches and repetitions for tests of kernels, on a device or emulated.
#pragma once

#ifdef CSPD_EMULATED
#include <signal.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <functional>
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

// A fiber has touched a page that it may not.
inline void on_fault(int) {
  std::printf("a kernel read or wrote beyond an array%s%s\n", check::context.empty() ? "" : " in ",
              check::context.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}
inline void watch_for_faults() {
  static char stack[1 << 16];
  stack_t there = {};
  there.ss_sp = stack;
  there.ss_size = sizeof(stack);
  struct sigaction action = {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  sigaltstack(&there, nullptr);
  for (const int fault : {SIGSEGV, SIGBUS}) sigaction(fault, &action, nullptr);
}

inline bool there_is_one() { return true; }
inline void synchronise() {}
// Up to a page that nobody may touch, so that reading beyond the end shows, too.
inline std::size_t pages(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
inline unsigned char* allocate(std::size_t bytes) {
  void* at = mmap(nullptr, pages(bytes) + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  auto* start = static_cast<unsigned char*>(at);
  if (mprotect(start + pages(bytes), 4096, PROT_NONE) != 0) std::abort();
  return start + (pages(bytes) - bytes);
}
inline void release(unsigned char* at, std::size_t bytes) { munmap(at - (pages(bytes) - bytes), pages(bytes) + 4096); }
inline void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void fill(void* at, int value, std::size_t bytes) {
  if (bytes > 0) std::memset(at, value, bytes);
}
constexpr bool kEmulated = true;

#else

inline void watch_for_faults() {}
inline bool there_is_one() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline void synchronise() { SUCCEED(cudaDeviceSynchronize()); }
inline unsigned char* allocate(std::size_t bytes) {
  void* at = nullptr;
  SUCCEED(cudaMalloc(&at, bytes));
  return static_cast<unsigned char*>(at);
}
inline void release(unsigned char* at, std::size_t) { SUCCEED(cudaFree(at)); }
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
  // The array starts ``offset`` values behind a boundary of 16 bytes.
  explicit Array(std::size_t count, std::size_t offset = 0)
      : count_(count), offset_(offset), memory_(allocate(bytes())) {
    fill(memory_, kPoison, bytes());
  }
  Array(const std::vector<T>& values, std::size_t offset = 0) : Array(values.size(), offset) { set(values); }
  Array(std::initializer_list<T> values) : Array(std::vector<T>(values)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    check_walls();
    release(memory_, bytes());
  }

  T* get() const { return reinterpret_cast<T*>(memory_ + front()); }

  void set(const std::vector<T>& values) const {
    if (values.size() != count_) std::abort();
    copy(get(), values.data(), count_ * sizeof(T));
  }

  // Back to NaNs.
  void poison() const { fill(get(), kPoison, count_ * sizeof(T)); }

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

  // A tool that watches every access sees where the memory ends if there is no wall; and where it is emulated, the
  // wall behind is a page.
  static std::size_t wall() { return small ? 0 : 4096; }
  std::size_t front() const { return wall() + offset_ * sizeof(T); }
  std::size_t bytes() const {
    const std::size_t end = front() + count_ * sizeof(T);
    return kEmulated ? (end + 15) / 16 * 16 : std::max(end + wall(), std::size_t{1});
  }

  std::vector<unsigned char> all() const {
    std::vector<unsigned char> values(bytes());
    copy(values.data(), memory_, bytes());
    return values;
  }

  void check_walls() const {
    const auto values = all();
    const std::size_t end = front() + count_ * sizeof(T);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (values[i] == kPoison || (i >= front() && i < end)) continue;
      const auto place = (static_cast<long>(i) - static_cast<long>(front())) / static_cast<long>(sizeof(T));
      check::result(false, __FILE__, __LINE__,
                    "place " + check::text(place) + " of an array of " + check::text(count_) + " was written");
      return;
    }
    ++check::done;
  }

  std::size_t count_, offset_;
  unsigned char* memory_;
};

// A launch, to succeed, of an early kernel, and its end. ``before`` is what the kernels before it still have to do:
// emulated, it is done when all threads of the first block wait for them, so that nothing of it can be read or written
// over earlier; on a device, before the launch. There is at least one block.
template <typename Launch>
void run_early(const std::function<void()>& before, const Launch& launch) {
#ifdef CSPD_EMULATED
  cspd::emulation::unfinished = before;
  RUN(launch());
  CHECK(!cspd::emulation::unfinished);
  cspd::emulation::unfinished = nullptr;
#else
  before();
  RUN(launch());
#endif
}

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
  watch_for_faults();
  if (!there_is_one()) {
    std::printf("%s: no CUDA device\n", name);
    return kSkipped;
  }
  tests();
  return check::finish(name);
}

}  // namespace device
