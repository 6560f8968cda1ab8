// The weights that one block of the persistent kernel multiplies with, on their way to its shared memory and there.
//
// A block makes ``columns`` columns of every layer, 8 at a time. The sum over k is split among its 8 warps. A thread
// copies, keeps and reads pieces of 16 bytes of its own, so that weights need no waiting among threads: lane (g, q),
// g = lane / 4 and q = lane % 4, has the part q of 4 of a span of k, of column g.
//
// Pieces either all stay (``resident``), or pass through a ring of stages that is refilled as it is used up, whatever
// the activations are doing.
#pragma once

#include "cspd/device.cuh"
#include "cspd/parameters.h"

namespace cspd {

constexpr int kChainThreads = 256;
constexpr int kChainWarps = kChainThreads / kWarp;
constexpr int kTileColumns = 8;
constexpr int kStages = 4;
constexpr int kPieceBytes = 16;

// How a layer of width W is cut into pieces.
template <typename T>
struct Pieces {
  static constexpr int kPiece = kPieceBytes / sizeof(T);  // values
  static constexpr int kSpan = 4 * kPiece;                // of k, by the four lanes of a column

  // Spans of a warp, the last warps' perhaps beyond W.
  static CSPD_HD int spans(int width) { return ((width + kSpan - 1) / kSpan + kChainWarps - 1) / kChainWarps; }
  static CSPD_HD int of_layer(int width, int columns) { return columns / kTileColumns * spans(width); }
};

// A thread's supply of pieces, layer after layer, the same layers again in every step.
template <typename T, bool Resident>
class WeightSupply {
 public:
  // ``layers`` [count] are addresses of [W, W] weights, in shared memory; ``ring`` is the block's.
  __device__ __forceinline__ WeightSupply(unsigned char* ring, const void* const* layers, int count, int steps,
                                          int width, int first_column, int columns, int stage_pieces)
      : ring_(ring), layers_(layers), count_(count), width_(width), columns_(columns), stage_pieces_(stage_pieces) {
    const int g = lane() / 4, q = lane() % 4;
    spans_ = Pieces<T>::spans(width);
    layer_pieces_ = Pieces<T>::of_layer(width, columns);
    column_ = first_column + g;
    k_ = warp() * spans_ * Pieces<T>::kSpan + q * Pieces<T>::kPiece;
    if constexpr (Resident) {
      for (int layer = 0; layer < count; ++layer) copy(layer, 0, layer_pieces_, layer * layer_pieces_);
      copy_async_commit();
    } else {
      stages_ = static_cast<std::int64_t>(steps) * count * stages_of_layer();
      for (int i = 0; i < kStages; ++i) refill();
    }
  }

  // Before the pieces of a layer are used.
  __device__ __forceinline__ void begin(int layer) {
    if constexpr (Resident) {
      if (!arrived_) copy_async_wait<0>();
      arrived_ = true;
      slot_ = layer * layer_pieces_;
    }
  }

  // The next piece of the layer: piece p of tile p / spans, span p % spans.
  __device__ __forceinline__ Vector<T, Pieces<T>::kPiece> next(int piece) {
    if constexpr (Resident) {
      return at(slot_ + piece);
    } else {
      const int part = piece % stage_pieces_;
      if (part == 0) copy_async_wait<kStages - 1>();
      const auto value = at(static_cast<int>(used_ % kStages) * stage_pieces_ + part);
      if (part == stage_pieces_ - 1 || piece == layer_pieces_ - 1) {
        ++used_;
        refill();
      }
      return value;
    }
  }

 private:
  using Piece = Vector<T, Pieces<T>::kPiece>;

  __device__ __forceinline__ int stages_of_layer() const { return (layer_pieces_ + stage_pieces_ - 1) / stage_pieces_; }

  __device__ __forceinline__ Piece& at(int slot) {
    return reinterpret_cast<Piece*>(ring_)[static_cast<std::size_t>(slot) * kChainThreads + threadIdx.x];
  }

  __device__ __forceinline__ void copy(int layer, int begin, int end, int slot) {
    const T* weight = static_cast<const T*>(layers_[layer]);
    for (int piece = begin; piece < end; ++piece) {
      const int column = column_ + piece / spans_ * kTileColumns, k = k_ + piece % spans_ * Pieces<T>::kSpan;
      const bool valid = column < width_ && k < width_;
      copy_async(&at(slot + piece - begin), valid ? weight + static_cast<std::int64_t>(column) * width_ + k : weight,
                 valid);
    }
  }

  // The next stage that is not yet under way; past the last one an empty group, so that groups can be counted.
  __device__ __forceinline__ void refill() {
    if (asked_ < stages_) {
      const int of_layer = stages_of_layer();
      const int layer = static_cast<int>(asked_ / of_layer % count_), begin = asked_ % of_layer * stage_pieces_;
      const int end = begin + stage_pieces_ < layer_pieces_ ? begin + stage_pieces_ : layer_pieces_;
      copy(layer, begin, end, static_cast<int>(asked_ % kStages) * stage_pieces_);
      ++asked_;
    }
    copy_async_commit();
  }

  unsigned char* ring_;
  const void* const* layers_;
  int count_, width_, columns_, stage_pieces_, spans_, layer_pieces_, column_, k_;
  int slot_ = 0;
  bool arrived_ = false;
  std::int64_t stages_ = 0, asked_ = 0, used_ = 0;
};

// One thread's share of [Rows, 8] += a [Rows, span] @ weights [8, span]^T, by tensor cores: half-precision types.
//
// A piece holds 8 values of k where an instruction wants two pairs 8 apart; in which order k is summed is the same
// for both operands, so pieces of both are taken as they lie. An instruction waits for the last one on its sums, so
// there are two sums for either half of a piece, of even and of odd spans (Lane 0 and 1).
template <typename T, int Rows>
class TileSum {
 public:
  template <int Lane>
  __device__ __forceinline__ void add(const Vector<T, 8>& piece, const T* a, int stride) {
    const int g = lane() / 4;
    const auto weights = bit_cast<Vector<std::uint32_t, 4>>(piece);
    Vector<std::uint32_t, 4> low = {}, high = {};
    if (g < Rows) low = *reinterpret_cast<const Vector<std::uint32_t, 4>*>(a + g * stride);
    if (Rows > 8) high = *reinterpret_cast<const Vector<std::uint32_t, 4>*>(a + (g + 8) * stride);
    multiply_tile<T>(c_[Lane][0], {low.v[0], high.v[0], low.v[1], high.v[1]}, {weights.v[0], weights.v[1]});
    multiply_tile<T>(c_[Lane][1], {low.v[2], high.v[2], low.v[3], high.v[3]}, {weights.v[2], weights.v[3]});
  }

  // Leave the sums in ``out`` [Rows, columns].
  __device__ __forceinline__ void store(float* out, int columns) {
    const int g = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + 8 * half >= Rows) continue;
      Vector<float, 2> sums;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 2 * half + i;
        sums.v[i] = (c_[0][0][at] + c_[0][1][at]) + (c_[1][0][at] + c_[1][1][at]);
      }
      *reinterpret_cast<Vector<float, 2>*>(out + (g + 8 * half) * columns + 2 * q) = sums;
    }
  }

 private:
  float c_[2][2][4] = {};
};

// The same in float32.
template <int Rows>
class TileSum<float, Rows> {
 public:
  template <int Lane>
  __device__ __forceinline__ void add(const Vector<float, 4>& piece, const float* a, int stride) {
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const auto values = *reinterpret_cast<const Vector<float, 4>*>(a + row * stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) c_[row] = fmaf(values.v[i], piece.v[i], c_[row]);
    }
  }

  __device__ __forceinline__ void store(float* out, int columns) {
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      const float sum = sum_over<4>(c_[row]);
      if (lane() % 4 == 0) out[row * columns + lane() / 4] = sum;
    }
  }

 private:
  float c_[Rows] = {};
};

}  // namespace cspd
