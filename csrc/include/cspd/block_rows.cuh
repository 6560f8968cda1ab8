// Rows of the residual stream in the layered kernels: a block has one, or a few, and a thread eight neighbouring
// columns of each, so that half-precision values go 16 bytes at a time. The norm and modulation of them.
#pragma once

#include "cspd/rows.cuh"

namespace cspd {

constexpr int kMaxWidth = 4096;
constexpr int kOwn = 8;  // columns of a thread
constexpr int kMostThreads = kMaxWidth / kOwn;
constexpr int kSharedWidth = 2048;  // up to here a block may have several rows, for which a thread takes many registers
constexpr int kMostWarps = kMostThreads / kWarp;

// Of a block that has rows of this width.
CSPD_HD int threads_of_row(int width) { return (width / kOwn + kWarp - 1) / kWarp * kWarp; }

__device__ __forceinline__ int own_column() { return kOwn * static_cast<int>(threadIdx.x); }

struct Eight {
  float v[kOwn];
};

// Eight values as they lie in memory, on a boundary of 16 bytes.
template <typename T>
struct Packed {
  static constexpr int kPart = 16 / sizeof(T);
  Vector<T, kPart> parts[kOwn / kPart];

  __device__ __forceinline__ float operator[](int i) const { return to_float(parts[i / kPart].v[i % kPart]); }
};

template <typename T>
__device__ __forceinline__ Packed<T> load_packed(const T* at) {
  Packed<T> values;
#pragma unroll
  for (int i = 0; i < kOwn / Packed<T>::kPart; ++i) {
    values.parts[i] = reinterpret_cast<const Vector<T, Packed<T>::kPart>*>(at)[i];
  }
  return values;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* at, const Eight& values) {
  Packed<T> stored;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) stored.parts[i / stored.kPart].v[i % stored.kPart] = from_float<T>(values.v[i]);
#pragma unroll
  for (int i = 0; i < kOwn / stored.kPart; ++i) {
    reinterpret_cast<Vector<T, stored.kPart>*>(at)[i] = stored.parts[i];
  }
}

// How a row of a width is spread over the warps of its block. Divides, so it is found out before anyone waits.
struct RowSpread {
  float inverse_width, inverse_own;  // of the whole row; what a warp's mean is its sum times
  int width, warps;

  // With ``rms`` all means are 0.
  __device__ __forceinline__ RowSpread(int width, bool rms)
      : inverse_width(1.0f / static_cast<float>(width)),
        inverse_own(rms ? 0.0f : 1.0f / static_cast<float>(columns(warp(), width))),
        width(width),
        warps(threads_of_row(width) / kWarp) {}

  // Of a warp; every one has some.
  static __device__ __forceinline__ int columns(int warp, int width) {
    const int left = width - warp * kWarp * kOwn;
    return left < kWarp * kOwn ? left : kWarp * kOwn;
  }
  __device__ __forceinline__ float share(int warp) const {
    return static_cast<float>(columns(warp, width)) * inverse_width;
  }
  __device__ __forceinline__ bool mine() const { return own_column() < width; }
};

// Floats of the scratch memory that statistics of so many rows take.
constexpr CSPD_HD int statistics_floats(int rows) { return 2 * kMostWarps * rows; }

// Of rows whose columns beyond the width are 0: every warp those of its own, in two passes over registers, which are
// then merged by Chan's formula. So there is one wait for all rows, and no difference of large squares. Every thread of
// the block calls this; ``scratch`` has statistics_floats(Rows).
template <int Rows>
__device__ __forceinline__ void statistics_of(const Eight (&rows)[Rows], const RowSpread& spread, float epsilon,
                                              float* scratch, Statistics (&statistics)[Rows]) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const auto& v = rows[r].v;
    float mean = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    mean = sum_over<kWarp>(mean) * spread.inverse_own;
    float squares = 0.0f;
    if (spread.mine()) {
      float d[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) d[i] = v[i] - mean;
      squares = (fmaf(d[0], d[0], d[1] * d[1]) + fmaf(d[2], d[2], d[3] * d[3])) +
                (fmaf(d[4], d[4], d[5] * d[5]) + fmaf(d[6], d[6], d[7] * d[7]));
    }
    squares = sum_over<kWarp>(squares);
    if (lane() == 0) {
      scratch[2 * kMostWarps * r + warp()] = mean;
      scratch[2 * kMostWarps * r + kMostWarps + warp()] = squares;
    }
  }
  sync_block();
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float *means = scratch + 2 * kMostWarps * r, *squares = means + kMostWarps;
    float mean = 0.0f, variance = 0.0f;
    for (int i = 0; i < spread.warps; ++i) mean = fmaf(means[i], spread.share(i), mean);
    for (int i = 0; i < spread.warps; ++i) {
      const float apart = means[i] - mean;
      variance += fmaf(apart * apart, spread.share(i), squares[i] * spread.inverse_width);
    }
    statistics[r] = {mean, inverse_square_root(variance + epsilon)};
  }
}

// Of a row, from a column on: by whoever has the first columns of a cache line of 128 bytes.
template <typename T>
__device__ __forceinline__ void prefetch_ahead(const Ahead& ahead, std::int64_t row, int column) {
  const int width = ahead.width;
  if (column * sizeof(T) % 128 != 0 || column >= width) return;
  if (ahead.gates) prefetch(static_cast<const T*>(ahead.gates) + (3 * row + 2) * width + column);
  if (!ahead.next) return;
  const T* next = static_cast<const T*>(ahead.next) + row * ahead.next_stride + column;
  prefetch(next);
  prefetch(next + width);
}

// What is done with a thread's columns of every row, by weights: it may be asked for before the rows are there.
struct Affine {
  Eight gain, offset;

  template <typename T>
  __device__ __forceinline__ Affine(const Modulation<T>& modulation, bool mine) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      gain.v[i] = 1.0f;
      offset.v[i] = 0.0f;
    }
    if (!modulation.gain || !mine) return;
    const auto gains = load_packed(modulation.gain + own_column()),
               offsets = load_packed(modulation.offset + own_column());
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      gain.v[i] = gains[i];
      offset.v[i] = offsets[i];
    }
  }
};

// A thread's columns of one row's modulation.
template <typename T>
struct RowModulation {
  Packed<T> shift, scale;

  RowModulation() = default;
  __device__ __forceinline__ RowModulation(const Modulation<T>& modulation, std::int64_t row, int width)
      : shift(load_packed(modulation.mods + row * modulation.stride + own_column())),
        scale(load_packed(modulation.mods + row * modulation.stride + width + own_column())) {}

  // The operand, of h.
  __device__ __forceinline__ Eight apply(const Eight& h, const Affine& affine, const Statistics& statistics) const {
    Eight out;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float normal =
          fmaf((h.v[i] - statistics.mean) * statistics.inverse_std, affine.gain.v[i], affine.offset.v[i]);
      out.v[i] = fmaf(normal, 1.0f + scale[i], shift[i]);
    }
    return out;
  }
};

}  // namespace cspd
