// Rows of the residual stream, spread over the threads of a block, and what is done with a whole row: LayerNorm and
// modulation.
#pragma once

#include "cspd/device.cuh"
#include "cspd/parameters.h"

namespace cspd {

constexpr int kMaxWidth = 2048;
constexpr int kRowThreads = 256;  // of a block
constexpr int kRowWarps = kRowThreads / kWarp;

// One thread's part of a row that ``Threads`` threads share: columns 4 (index + Threads i) .. + 3, 0 beyond the width.
template <int Threads>
struct RowPart {
  static constexpr int kChunks = kMaxWidth / 4 / Threads;
  Vector<float, 4> v[kChunks];

  static __device__ __forceinline__ int column(int chunk) {
    return 4 * (static_cast<int>(threadIdx.x) % Threads + Threads * chunk);
  }
};

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

// The sum over the threads that share a row, the same bits in each. ``scratch`` has kRowWarps floats, and every
// thread of the block calls this; between two calls with one scratch there must be another wait of the block.
template <int Threads>
__device__ __forceinline__ float sum_over_row(float value, float* scratch) {
  value = sum_over<kWarp>(value);
  if constexpr (Threads > kWarp) {
    if (lane() == 0) scratch[warp()] = value;
    sync_block();
    constexpr int kWarps = Threads / kWarp;
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) value += scratch[warp() / kWarps * kWarps + i];
  }
  return value;
}

struct Statistics {
  float mean, inverse_std;
};

// How a row of a width is spread over the warps that share it. Divides, so it is found out before anyone waits.
template <int Threads>
struct RowShape {
  static constexpr int kWarps = Threads / kWarp;
  float inverse_width, inverse_own;  // of the whole row, of the columns of this thread's warp
  float shares[kWarps];              // of each warp in the whole row

  __device__ __forceinline__ explicit RowShape(int width) {
    inverse_width = 1.0f / static_cast<float>(width);
    int own = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      int count = 0;
#pragma unroll
      for (int chunk = 0; chunk < RowPart<Threads>::kChunks; ++chunk) {
        const int left = width - 4 * (kWarp * i + Threads * chunk);
        count += left < 0 ? 0 : left > 4 * kWarp ? 4 * kWarp : left;
      }
      shares[i] = static_cast<float>(count) * inverse_width;
      if (i == warp() % kWarps) own = count;
    }
    inverse_own = 1.0f / static_cast<float>(own > 0 ? own : 1);
  }
};

// Of a row's values: every warp those of its own, in two passes over registers, which are then merged by Chan's
// formula. So there is one wait, and no difference of large squares. ``scratch`` [2, kRowWarps] as for sum_over_row.
template <int Threads>
__device__ __forceinline__ Statistics row_statistics(const RowPart<Threads>& row, const RowShape<Threads>& shape,
                                                     int width, float epsilon, float* scratch) {
  constexpr int kWarps = Threads / kWarp;
  float mean = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < row.kChunks; ++chunk) {
    const auto& v = row.v[chunk].v;
    mean += (v[0] + v[1]) + (v[2] + v[3]);  // short chains: others wait for this
  }
  mean = sum_over<kWarp>(mean) * shape.inverse_own;
  float squares = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < row.kChunks; ++chunk) {
    if (row.column(chunk) >= width) continue;
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = row.v[chunk].v[i] - mean;
    squares += fmaf(d[0], d[0], d[1] * d[1]) + fmaf(d[2], d[2], d[3] * d[3]);
  }
  squares = sum_over<kWarp>(squares);
  float variance = squares * shape.inverse_width;
  if constexpr (kWarps > 1) {
    if (lane() == 0) {
      scratch[warp()] = mean;
      scratch[kRowWarps + warp()] = squares;
    }
    sync_block();
    const float* means = scratch + warp() / kWarps * kWarps;
    mean = variance = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) mean = fmaf(means[i], shape.shares[i], mean);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float apart = means[i] - mean;
      variance += fmaf(apart * apart, shape.shares[i], means[kRowWarps + i] * shape.inverse_width);
    }
  }
  return {mean, inverse_square_root(variance + epsilon)};
}

// What one thread needs of a modulation for its part of a row: asked for before the row is there, as far as the
// registers of a thread with a long part go, and else when it is used.
template <int Threads, typename T>
class ModulationPart {
 public:
  __device__ __forceinline__ ModulationPart(const Modulation<T>& modulation, std::int64_t row, int width)
      : gain_(modulation.gain), offset_(modulation.offset), mods_(modulation.mods + row * modulation.stride) {
    width_ = width;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = RowPart<Threads>::column(chunk);
      if (column >= width) continue;
      if (kModsEarly) mods_of_[chunk] = load_mods(column);
      if (kGainsEarly && gain_) gains_of_[chunk] = load_gains(column);
    }
  }

  // Four columns of the operand.
  __device__ __forceinline__ Vector<float, 4> apply(int chunk, const Vector<float, 4>& h,
                                                    const Statistics& statistics) const {
    const int column = RowPart<Threads>::column(chunk);
    const Mods mods = kModsEarly ? mods_of_[kModsEarly ? chunk : 0] : load_mods(column);
    Gains gains = {{{1.0f, 1.0f, 1.0f, 1.0f}}, {}};
    if (gain_) gains = kGainsEarly ? gains_of_[kGainsEarly ? chunk : 0] : load_gains(column);
    Vector<float, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float normal =
          fmaf((h.v[i] - statistics.mean) * statistics.inverse_std, gains.gain.v[i], gains.offset.v[i]);
      out.v[i] = fmaf(normal, 1.0f + to_float(mods.scale.v[i]), to_float(mods.shift.v[i]));
    }
    return out;
  }

 private:
  struct Mods {
    Vector<T, 4> shift, scale;
  };
  struct Gains {
    Vector<float, 4> gain, offset;
  };
  static constexpr int kChunks = RowPart<Threads>::kChunks;
  static constexpr bool kModsEarly = kChunks * sizeof(T) <= 16, kGainsEarly = kChunks <= 4;

  __device__ __forceinline__ Mods load_mods(int column) const {
    return {*reinterpret_cast<const Vector<T, 4>*>(mods_ + column),
            *reinterpret_cast<const Vector<T, 4>*>(mods_ + width_ + column)};
  }

  __device__ __forceinline__ Gains load_gains(int column) const {
    return {load_four(gain_ + column), load_four(offset_ + column)};
  }

  const float *gain_, *offset_;
  const T* mods_;
  int width_;
  Mods mods_of_[kModsEarly ? kChunks : 1];
  Gains gains_of_[kGainsEarly ? kChunks : 1];
};

}  // namespace cspd
