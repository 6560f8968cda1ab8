// What kernels ask of the machine they run on. Each has two forms: instructions of a CUDA device, and (CSPD_EMULATED)
// threads that take turns on the host, which csrc/emulation holds.
//
// Blocks are one-dimensional. Shared memory is the dynamic one.
#pragma once

#include "cspd/portable.cuh"

#ifdef CSPD_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace cspd {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// How a kernel is launched.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks run at the same time
  bool early = false;        // may start while the kernel before it in the stream still runs: see wait_for_earlier
};

#ifndef CSPD_EMULATED

// Whether kernels with ``early`` in their grid do start early on the current device: their code must have the wait,
// which that of compute capability 9.0 and later has, and graphs hold such launches from CUDA 12.3 on. All kernels are
// compiled for the same devices, so the first one that asks finds out for all.
inline bool starts_early(const void* kernel) {
  constexpr int kDevices = 64;
  enum Answer : signed char { kUnknown, kNo, kYes };
  static std::atomic<signed char> answers[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  auto& answer = answers[device];
  if (answer == kUnknown) {
    int runtime = 0, driver = 0;
    cudaFuncAttributes code = {};
    const bool yes = cudaRuntimeGetVersion(&runtime) == cudaSuccess && runtime >= 12030 &&
                     cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
                     cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
    answer = yes ? kYes : kNo;
  }
  return answer == kYes;
}

// Launch on the current device. The kernels' shared memory may exceed the 48 KiB that need no opting in.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, Arguments... arguments) {
  if (grid.blocks == 0) return cudaSuccess;
  if (grid.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > 48 << 10) {
    const auto bytes = static_cast<int>(grid.shared_bytes);
    const auto set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (set != cudaSuccess) {
      cudaGetLastError();
      return set;
    }
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (grid.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (grid.early && starts_early(reinterpret_cast<const void*>(kernel))) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const auto launched = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  cudaGetLastError();  // not to be found by whoever asks next
  return launched;
}

template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Programmatic dependent launch: in a kernel whose grid is ``early``, wait until every kernel before it in the stream
// has ended and its writing can be seen, then let the next one start, which waits here in turn.
//
// Such a kernel may be launched while the one before it runs. What makes that safe:
// - Before the wait only such memory is read as nothing in the chain writes: weights, biases, tables. Not what an
//   earlier kernel writes, though it has surely ended: one rule for all. Nothing is written.
// - Every thread of every block waits, those without work of their own, too. So a kernel ends after all that came
//   before it, and whoever waits for its end waits for all of them, a library's kernels in between or not.
// - The next kernel is let go after the wait, never before: at most two of a chain are on the device at a time, and
//   its blocks get what the running ones leave free. A library's kernel ends only after what it read was
//   written, and an early one after it waits for its end.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }

__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// Copy 16 bytes to shared memory in the background, or zeros where not ``valid``: ``global`` may then be anywhere.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// End a group of copies of this thread.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the last ``Pending`` groups of this thread are under way; this thread then sees the others.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four matrices of [8, 8] half-precision values out of shared memory: lane i has the address of row i % 8 of matrix
// i / 8, 16 bytes, and gets of each matrix the pair (row lane / 4, columns 2 (lane % 4)). What is read may be copied
// over after the next wait of the warp.
__device__ __forceinline__ void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(from)
               : "memory");
}

// Bring the cache line of an address into the second-level cache, in the background: a hint. It reads nothing.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Words that blocks pass to each other while they run: each is read and written whole, past the caches of one
// multiprocessor, and in no order with any other.
__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* at) {
  std::uint32_t word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

// Four of them where ``wanted``, else ``otherwise`` four times: without a branch, so that several are under way
// together.
__device__ __forceinline__ Vector<std::uint32_t, 4> load_relaxed_if(bool wanted, const Vector<std::uint32_t, 4>* at,
                                                                    std::uint32_t otherwise) {
  Vector<std::uint32_t, 4> words = {{otherwise, otherwise, otherwise, otherwise}};
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;"
      " @wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(words.v[0]), "+r"(words.v[1]), "+r"(words.v[2]), "+r"(words.v[3])
      : "l"(at), "r"(static_cast<unsigned>(wanted))
      : "memory");
  return words;
}

__device__ __forceinline__ void store_relaxed(std::uint32_t* at, std::uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

// The cache line at ``at`` is on its way to the L2 cache.
__device__ __forceinline__ void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// What this thread wrote before is seen, by who sees what it writes after.
__device__ __forceinline__ void fence() { __threadfence(); }

// Somebody else may run now.
__device__ __forceinline__ void pause() {}

__device__ __forceinline__ std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// c += a b, [16, 8] += [16, 16] [16, 8], as the lanes of a warp hold them (PTX, mma.m16n8k16): of a the pairs
// (row g, k 2 q), (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8); of b (k 2 q, column g), (2 q + 8, g); of c the pairs
// (g, column 2 q), (g + 8, 2 q), with g = lane / 4 and q = lane % 4.
#define CSPD_MMA(type)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <typename T>
__device__ __forceinline__ void multiply_tile(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_tile<bfloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                                        const std::uint32_t (&b)[2]) {
  CSPD_MMA("bf16");
}

template <>
__device__ __forceinline__ void multiply_tile<float16>(float (&c)[4], const std::uint32_t (&a)[4],
                                                       const std::uint32_t (&b)[2]) {
  CSPD_MMA("f16");
}

#undef CSPD_MMA

#endif  // CSPD_EMULATED

// Whether a kernel is to leave everything as it is: ``live`` is null, or a flag that an earlier kernel sets, so that it
// is read after the wait for them.
__device__ __forceinline__ bool idle(const std::int32_t* live) { return live && *live == 0; }

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum over groups of ``Lanes`` neighbouring lanes, the same bits in each of them.
template <int Lanes, typename T>
__device__ __forceinline__ T sum_over(T value) {
#pragma unroll
  for (int distance = 1; distance < Lanes; distance *= 2) value += shuffle_xor(value, distance);
  return value;
}

}  // namespace cspd
