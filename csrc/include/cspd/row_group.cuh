// Several rows at once, of each of which a thread of the block has the same columns: what belongs to a column is loaded
// once for all of them, and they wait for each other's sums only once.
//
// A row's bits depend on the row alone: not on how many others there are, nor on its place among them. So what two
// lanes have of a row is merged to the same bits whichever of them does it.
#pragma once

#include "cspd/rows.cuh"

namespace cspd {

// One thread's part of ``Rows`` rows: columns 4 (index + 256 chunk) .. + 3, 0 beyond the width.
template <int Rows, int Chunks>
struct RowGroup {
  Vector<float, 4> v[Rows][Chunks];

  static __device__ __forceinline__ int column(int chunk) {
    return 4 * (static_cast<int>(threadIdx.x) + kRowThreads * chunk);
  }
};

// Of some values: their sum, and the sum of squares around their mean.
struct Moments {
  float sum, squares;
};

__device__ __forceinline__ Moments shuffle_xor(Moments value, int lanes) {
  return {cspd::shuffle_xor(value.sum, lanes), cspd::shuffle_xor(value.squares, lanes)};
}

constexpr int kMerges = 5;  // of two lanes, until a warp is one

CSPD_HD constexpr int merge_distance(int merge) { return kWarp >> (merge + 1); }

// What a warp has of row r, in the lanes from ``lanes_of_row<Rows> * r`` on: while a lane has several rows, it gives
// half of them to another lane and takes that one's of the other half.
template <int Rows>
constexpr int lanes_of_row = kWarp / Rows;

template <int Rows, typename Value, typename Merge>
__device__ __forceinline__ Value merged_over_warp(Value (&values)[Rows], const Merge& merge) {
#pragma unroll
  for (int i = 0; i < kMerges; ++i) {
    const int distance = merge_distance(i), half = Rows >> (i + 1);
    if (half == 0) values[0] = merge(i, values[0], shuffle_xor(values[0], distance));
    const bool upper = (lane() & distance) != 0;
#pragma unroll
    for (int row = 0; row < half; ++row) {
      const Value given = upper ? values[row] : values[row + half];
      const Value kept = upper ? values[row + half] : values[row];
      values[row] = merge(i, kept, shuffle_xor(given, distance));
    }
  }
  return values[0];
}

// How a row of a width is spread over a block. Divides, so it is found out before anyone waits.
template <int Chunks>
struct GroupShape {
  static constexpr int kPartWarps = kRowWarps / 2;  // of which one lane merges what they have of a row
  // Of two lanes' columns: 1 / own, 1 / other, and own other / (own + other).
  struct Pair {
    float own, other, both;
  };
  float inverse_width, inverse_own;  // of the whole row, of this thread's columns
  Pair pairs[kMerges];
  float warps[kPartWarps], inverse_warps[kPartWarps];  // the columns of each

  static __device__ __forceinline__ float inverse(float count) { return count > 0.0f ? 1.0f / count : 0.0f; }

  __device__ __forceinline__ explicit GroupShape(int width) {
    inverse_width = 1.0f / static_cast<float>(width);
    float own = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) own += RowGroup<1, Chunks>::column(chunk) < width ? 4.0f : 0.0f;
    inverse_own = inverse(own);
#pragma unroll
    for (int i = 0; i < kMerges; ++i) {
      const float other = cspd::shuffle_xor(own, merge_distance(i));
      pairs[i] = {inverse(own), inverse(other), own * other * inverse(own + other)};
      own += other;
    }
#pragma unroll
    for (int i = 0; i < kPartWarps; ++i) {
      int count = 0;
#pragma unroll
      for (int chunk = 0; chunk < Chunks; ++chunk) {
        const int left = width - 4 * (kWarp * (lane() % 2 * kPartWarps + i) + kRowThreads * chunk);
        count += left < 0 ? 0 : left > 4 * kWarp ? 4 * kWarp : left;
      }
      warps[i] = static_cast<float>(count);
      inverse_warps[i] = inverse(warps[i]);
    }
  }
};

// Of every row, in every thread: moments of a thread's own columns in two passes over registers, merged by Chan's
// formula over lanes, then over warps. So there is one wait, and no difference of large squares. Every thread of the
// block calls this; ``scratch`` [Rows, kRowWarps]. Between two calls with one scratch there must be another wait.
template <int Rows, int Chunks>
__device__ __forceinline__ void group_statistics(const RowGroup<Rows, Chunks>& group, const GroupShape<Chunks>& shape,
                                                 int width, float epsilon, Moments* scratch,
                                                 Statistics (&statistics)[Rows]) {
  static_assert(Rows <= kWarp / 2 && kRowWarps == 8);
  Moments moments[Rows];
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      const auto& v = group.v[row][chunk].v;
      sum += (v[0] + v[1]) + (v[2] + v[3]);  // short chains: others wait for this
    }
    const float mean = sum * shape.inverse_own;
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      if (group.column(chunk) >= width) continue;
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] = group.v[row][chunk].v[i] - mean;
      squares += fmaf(d[0], d[0], d[1] * d[1]) + fmaf(d[2], d[2], d[3] * d[3]);
    }
    moments[row] = {sum, squares};
  }
  const auto of_warp = merged_over_warp(moments, [&](int i, const Moments& own, const Moments& other) {
    const auto& pair = shape.pairs[i];
    const float apart = own.sum * pair.own - other.sum * pair.other;  // its sign is lost: the same in both lanes
    return Moments{own.sum + other.sum, fmaf(apart * apart, pair.both, own.squares + other.squares)};
  });
  if (lane() % lanes_of_row<Rows> == 0) scratch[lane() / lanes_of_row<Rows> * kRowWarps + warp()] = of_warp;
  sync_block();
  // Two neighbouring lanes a row, half of the warps each.
  constexpr int kPartWarps = GroupShape<Chunks>::kPartWarps;
  const auto* part = reinterpret_cast<const Vector<Moments, 2>*>(scratch + lane() / 2 % Rows * kRowWarps) +
                     lane() % 2 * (kPartWarps / 2);
  const Vector<Moments, 2> read[2] = {part[0], part[1]};
  float m[kPartWarps];
#pragma unroll
  for (int i = 0; i < kPartWarps; ++i) m[i] = read[i / 2].v[i % 2].sum;
  float sum = (m[0] + m[1]) + (m[2] + m[3]);
  sum += cspd::shuffle_xor(sum, 1);
  const float mean = sum * shape.inverse_width;
#pragma unroll
  for (int i = 0; i < kPartWarps; ++i) {
    const float apart = m[i] * shape.inverse_warps[i] - mean;
    m[i] = fmaf(apart * apart, shape.warps[i], read[i / 2].v[i % 2].squares);
  }
  float squares = (m[0] + m[1]) + (m[2] + m[3]);
  squares += cspd::shuffle_xor(squares, 1);
  const float inverse_std = inverse_square_root(squares * shape.inverse_width + epsilon);
#pragma unroll
  for (int row = 0; row < Rows; ++row) statistics[row] = {shuffle(mean, 2 * row), shuffle(inverse_std, 2 * row)};
}

// Every warp's share of the product of each row with ``weights``, a row like them, into ``out`` [Rows, kRowWarps].
template <int Rows, int Chunks>
__device__ __forceinline__ void group_products(const RowGroup<Rows, Chunks>& group, const RowGroup<1, Chunks>& weights,
                                               float* out) {
  float sums[Rows];
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    sums[row] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[row] = fmaf(group.v[row][chunk].v[i], weights.v[0][chunk].v[i], sums[row]);
    }
  }
  const float sum = merged_over_warp(sums, [](int, float own, float other) { return own + other; });
  if (lane() % lanes_of_row<Rows> == 0) out[lane() / lanes_of_row<Rows> * kRowWarps + warp()] = sum;
}

// What one thread needs of the modulation of rows ``first`` .. ``first + Rows``, as far as there are ``rows``: asked
// for before the rows themselves are there.
template <int Rows, int Chunks, typename T>
class GroupModulation {
 public:
  __device__ __forceinline__ GroupModulation(const Modulation<T>& modulation, int first, int rows, int width) {
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      const int column = RowGroup<Rows, Chunks>::column(chunk);
      gain_[chunk] = {{1.0f, 1.0f, 1.0f, 1.0f}};
      offset_[chunk] = {};
      if (column >= width) continue;
      if (modulation.gain) {
        gain_[chunk] = load_four(modulation.gain + column);
        offset_[chunk] = load_four(modulation.offset + column);
      }
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        if (first + row >= rows) continue;
        const T* mods = modulation.mods + static_cast<std::int64_t>(first + row) * modulation.stride + column;
        shift_[row][chunk] = *reinterpret_cast<const Vector<T, 4>*>(mods);
        scale_[row][chunk] = *reinterpret_cast<const Vector<T, 4>*>(mods + width);
      }
    }
  }

  // Four columns of the operand.
  __device__ __forceinline__ Vector<float, 4> apply(int row, int chunk, const Vector<float, 4>& h,
                                                    const Statistics& statistics) const {
    Vector<float, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float normal =
          fmaf((h.v[i] - statistics.mean) * statistics.inverse_std, gain_[chunk].v[i], offset_[chunk].v[i]);
      out.v[i] = fmaf(normal, 1.0f + to_float(scale_[row][chunk].v[i]), to_float(shift_[row][chunk].v[i]));
    }
    return out;
  }

 private:
  Vector<T, 4> shift_[Rows][Chunks], scale_[Rows][Chunks];
  Vector<float, 4> gain_[Chunks], offset_[Chunks];
};

}  // namespace cspd
