// The normals that PyTorch's generator of a CUDA device gives, bit for bit: those of several calls of normal_() at
// once.
//
// PyTorch fills a tensor by 256 * grid threads that take four normals a round from cuRAND's device generator: thread t
// holds subsequence t of Philox 4x32-10, and its normals of round r go to the elements t + (4 r + k) * 256 * grid. A
// call moves the generator by the rounds it took, so round r of call c has the counter of round c * rounds + r.
//
// Source: curand_init, curand_normal4 (CUDA toolkit, curand_kernel.h and curand_normal.h); PyTorch,
// aten/src/ATen/native/cuda/DistributionTemplates.h, as in 2.13.
#pragma once

#include "cspd/device.cuh"
#include "cspd/parameters.h"
#include "cspd/philox.cuh"

namespace cspd {

constexpr int kRandnThreads = 256;

// As the special function unit approximates them; on the host to the last place.
CSPD_HD float approximate_sine(float angle) {
#ifdef __CUDA_ARCH__
  return __sinf(angle);
#else
  return std::sin(angle);
#endif
}

CSPD_HD float approximate_cosine(float angle) {
#ifdef __CUDA_ARCH__
  return __cosf(angle);
#else
  return std::cos(angle);
#endif
}

// What nvcc fuses in PyTorch's build is fused here: the two uniforms, in (0, 1] and (0, 2 pi].
CSPD_HD float radius_of(std::uint32_t word) {
  return sqrtf(-2.0f * logf(fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f)));
}

CSPD_HD float angle_of(std::uint32_t word) {
  constexpr float kTwoPi = 6.2831855f;
  return fmaf(static_cast<float>(word), 0x1p-32f * kTwoPi, 0x1p-33f * kTwoPi);
}

// ``First``: type of the first call, whose numbers are converted.
template <typename T, typename First>
__global__ void __launch_bounds__(kRandnThreads) randn_kernel(Randn draw, T* out) {
  const unsigned grid = draw.grid, rounds = draw.rounds;
  const unsigned turn = blockIdx.x / grid, block = blockIdx.x - turn * grid;  // call * rounds + round
  const unsigned call = turn / rounds, round = turn - call * rounds;
  const std::uint64_t counter = draw.counter + turn;
  const std::uint32_t thread = block * kRandnThreads + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(grid) * kRandnThreads;
  std::int64_t element = thread + 4 * stride * round;
  if (element >= draw.numel) return;

  const std::int64_t place = draw.reversed ? draw.calls - 1 - static_cast<std::int64_t>(call) : call;
  T* to = out + place * draw.numel;
  const auto store = [&](float normal) {
    // PyTorch multiplies by a standard deviation of 1 and adds a mean of 0, so that no zero is negative.
    normal += 0.0f;
    if (call == 0) normal = to_float(from_float<First>(normal));
    if (element < draw.numel) to[element] = from_float<T>(normal);
    element += stride;
  };
  const Words words = philox(static_cast<std::uint32_t>(draw.seed), static_cast<std::uint32_t>(draw.seed >> 32),
                             static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), thread, 0);
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    if (element >= draw.numel) return;
    const float radius = radius_of(words.v[pair]), angle = angle_of(words.v[pair + 1]);
    store(radius * approximate_sine(angle));
    store(radius * approximate_cosine(angle));
  }
}

}  // namespace cspd
