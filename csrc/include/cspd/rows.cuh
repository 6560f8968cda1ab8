// What rows of the residual stream are read and written by, and what is known of a whole one.
#pragma once

#include "cspd/device.cuh"
#include "cspd/parameters.h"

namespace cspd {

constexpr int kRowThreads = 256;  // of a block
constexpr int kRowWarps = kRowThreads / kWarp;

template <typename T>
__device__ __forceinline__ Vector<float, 4> load_four(const T* at) {
  const auto loaded = *reinterpret_cast<const Vector<T, 4>*>(at);
  Vector<float, 4> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) values.v[i] = to_float(loaded.v[i]);
  return values;
}

template <typename T>
__device__ __forceinline__ void store_four(T* at, const Vector<float, 4>& values) {
  Vector<T, 4> stored;
#pragma unroll
  for (int i = 0; i < 4; ++i) stored.v[i] = from_float<T>(values.v[i]);
  *reinterpret_cast<Vector<T, 4>*>(at) = stored;
}

// The row of a token in the first group; the other groups of the ``period`` tokens of a step follow theirs. Tokens are
// few enough for 32 bits, whose division is short.
__device__ __forceinline__ std::int64_t row_of_token(std::int64_t token, std::int64_t period, int groups) {
  if (groups == 1) return token;
  const auto step = static_cast<std::uint32_t>(token) / static_cast<std::uint32_t>(period);
  return token + step * (groups - 1) * period;
}

struct Statistics {
  float mean, inverse_std;
};

}  // namespace cspd
