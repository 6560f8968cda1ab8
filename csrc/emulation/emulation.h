// Kernels on the host, thread by thread: what csrc/include/cspd/device.cuh asks of a device, for tests without one.
//
// Every thread of a block is a fiber. It runs until it waits for others (block, warp, another block's words), then
// another one runs; which one is drawn anew every round (CSPD_EMULATION_SEED), so that a missing wait shows as a
// changing result, and one block at a time sleeps while the others run ahead. Shared memory starts as NaNs. Background
// copies happen when they are waited for, at the latest moment allowed. Fibers that all wait for each other are an
// error, not a hang.
//
// Not shown here: what a cache or a reordered store would hide, speed, and limits of a device.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cspd/portable.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "cudaErrorUnknown";
}

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated"; }

inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

struct Index {
  unsigned x;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace cspd {

namespace emulation {

// What one thread shows to the others of its warp, or takes from them.
union Payload {
  double number;
  std::uint64_t bits;
  std::uint32_t words[8];
};

// Run ``body`` for every thread of every block; false where they wait for each other for ever,
// or, of an ``early`` kernel, one ends without having waited for the kernels before it.
bool run(std::int64_t blocks, int threads, std::size_t shared_bytes, bool together, bool early,
         const std::function<void()>& body);

// What the kernel before has left to do when the next, early one starts: for tests, which set it. It is done when all
// threads of a block wait for it, the first time; what they read before, they read too early.
extern std::function<void()> unfinished;

// Give every thread of the warp the payloads of all 32. Whoever has ended takes no part, which is an error.
const Payload* exchange(const Payload& mine);

void* shared_memory();
void sync_block();
void wait_for_earlier();
void yield();
void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);
// Of this thread's own work: a busy machine must not make waits seem long.
std::uint64_t nanoseconds();

template <typename T>
Payload payload(T value) {
  static_assert(sizeof(T) <= sizeof(Payload));
  Payload result = {};
  std::memcpy(&result, &value, sizeof(value));
  return result;
}

template <typename T>
T value_of(const Payload& payload) {
  T value;
  std::memcpy(&value, &payload, sizeof(value));
  return value;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments, typename Grid>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t, Arguments... arguments) {
  if (grid.blocks < 0 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  const auto body = [&] { std::apply(kernel, values); };
  const bool ended = emulation::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cooperative, grid.early, body);
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulation::shared_memory());
}

inline void sync_block() { emulation::sync_block(); }

inline void sync_warp() { emulation::exchange({}); }

inline void wait_for_earlier() { emulation::wait_for_earlier(); }

template <typename T>
T shuffle(T value, int lane) {
  return emulation::value_of<T>(emulation::exchange(emulation::payload(value))[lane]);
}

template <typename T>
T shuffle_xor(T value, int lanes) {
  return shuffle(value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline unsigned ballot(bool vote) {
  const auto* votes = emulation::exchange(emulation::payload(static_cast<std::uint32_t>(vote)));
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= votes[i].words[0] << i;
  return bits;
}

inline int lowest_bit(unsigned bits) { return bits ? __builtin_ctz(bits) : -1; }

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

inline void copy_async(void* shared, const void* global, bool valid) { emulation::copy_later(shared, global, valid); }

inline void copy_async_commit() { emulation::commit_copies(); }

template <int Pending>
void copy_async_wait() {
  emulation::wait_for_copies(Pending);
}

template <typename T>
T load_relaxed(const T* at) {
  return *at;
}

template <typename T>
T load_relaxed_if(bool wanted, const T* at, std::uint32_t otherwise) {
  return wanted ? *at : T{{otherwise, otherwise, otherwise, otherwise}};
}

inline void store_relaxed(std::uint32_t* at, std::uint32_t word) { *at = word; }

inline void prefetch_line(const void* at) { static_cast<void>(*static_cast<const volatile char*>(at)); }

inline void fence() {}

inline void pause() { emulation::yield(); }

inline std::uint64_t nanoseconds() { return emulation::nanoseconds(); }

// Looks at the memory, so that what lies beyond an array shows.
inline void prefetch(const void* at) { static_cast<void>(*static_cast<const volatile unsigned char*>(at)); }

inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  // A lane's row as it is now: others may not have written theirs.
  emulation::Payload mine = {};
  std::memcpy(&mine, row, 16);
  const auto* rows = emulation::exchange(mine);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) matrices[i] = rows[8 * i + lane / 4].words[lane % 4];
}

// Products of the operands' own values, summed in float32, in order of k.
template <typename T>
void multiply_tile(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulation::Payload mine = {};
  for (int i = 0; i < 4; ++i) mine.words[i] = a[i];
  for (int i = 0; i < 2; ++i) mine.words[4 + i] = b[i];
  const auto* all = emulation::exchange(mine);
  const auto half = [](std::uint32_t word, int i) { return to_float(T{static_cast<std::uint16_t>(word >> 16 * i)}); };
  const int g = static_cast<int>(threadIdx.x % 32) / 4, q = static_cast<int>(threadIdx.x % 32) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto& left = all[row % 8 * 4 + k % 8 / 2];
      const auto& right = all[column * 4 + k % 8 / 2];
      c[i] += half(left.words[row / 8 + k / 8 * 2], k % 2) * half(right.words[4 + k / 8], k % 2);
    }
  }
}

}  // namespace cspd
