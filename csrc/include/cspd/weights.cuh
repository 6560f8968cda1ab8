// The weights that one block of the persistent kernel multiplies with, on their way to its shared memory and there.
//
// A block makes ``columns`` columns of every layer, 8 at a time. The sum over k is split among its 8 warps. A thread
// copies, keeps and reads pieces of 16 bytes of its own, so that weights need no waiting among threads: lane (g, q),
// g = lane / 4 and q = lane % 4, has the part q of 4 of a span of k, of column g.
//
// Pieces either all stay (``resident``), those of one layer perhaps in registers; or pass through a ring of stages that
// is refilled as it is used up, whatever the activations are doing.
#pragma once

#include "cspd/device.cuh"
#include "cspd/parameters.h"

namespace cspd {

// Sixteen bytes of weights or of activations, as words: the compiler moves the halves of words one by one.
using Piece = Vector<std::uint32_t, 4>;

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
  static CSPD_HD constexpr int spans(int width) {
    return ((width + kSpan - 1) / kSpan + kChainWarps - 1) / kChainWarps;
  }
  static CSPD_HD constexpr int of_layer(int width, int columns) { return columns / kTileColumns * spans(width); }
};

// Whether of resident weights one layer, of one tile, stays in registers: many rows take much of the shared memory.
CSPD_HD constexpr bool keeps_layer(int rows, int columns) { return rows > 8 && columns == kTileColumns; }

// A thread's supply of pieces, layer after layer, the same layers again in every step.
template <typename T, int Rows, int MaxWidth, bool Resident>
class WeightSupply {
 public:
  // Float32 weights are taken piece by piece: a tile of them is too much for the registers.
  static constexpr int kSpans = sizeof(T) == 2 ? Pieces<T>::spans(MaxWidth) : 0;
  static constexpr bool kAhead = Resident || (kSpans > 0 && Rows <= 4);  // as far as registers go

  // The pieces of one tile in registers, zeros where it has fewer spans.
  struct Tile {
    Piece v[kSpans > 0 ? kSpans : 1];
  };

  // ``layers`` [count] are addresses of [W, W] weights, in shared memory; ``ring`` is the block's.
  __device__ __forceinline__ WeightSupply(unsigned char* ring, const void* const* layers, int count, int steps,
                                          int width, int first_column, int columns, int stage_pieces)
      : ring_(reinterpret_cast<Piece*>(ring) + threadIdx.x),
        layers_(layers),
        count_(count),
        width_(width),
        spans_(Pieces<T>::spans(width)),
        layer_pieces_(Pieces<T>::of_layer(width, columns)),
        stage_pieces_(stage_pieces),
        column_(first_column + lane() / 4),
        k_(warp() * spans_ * Pieces<T>::kSpan + lane() % 4 * Pieces<T>::kPiece),
        whole_tiles_(stage_pieces % spans_ == 0) {
    if constexpr (Resident) {
      const int kept = keeps_layer(Rows, columns) ? 1 : 0;
      copy((count - kept) * layer_pieces_, 0);
      copy_async_commit();
      kept_layer_ = count - kept;
      if (kept) kept_ = tile_of(static_cast<const T*>(layers[count - 1]));
    } else {
      left_ = steps * count * ((layer_pieces_ + stage_pieces - 1) / stage_pieces);
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) refill();
    }
  }

  // Before the operand of a layer is there: its first tile, where that is asked for so early.
  __device__ __forceinline__ Tile begin(int layer) {
    if constexpr (Resident) {
      if (!arrived_) copy_async_wait<0>();
      arrived_ = true;
      if (keeps_layer(Rows, kTileColumns) && layer == kept_layer_) return kept_;
      slot_ = layer * layer_pieces_;
    } else {
      in_layer_ = 0;
    }
    if (kAhead && whole_tiles()) return next_tile();
    return {};
  }

  // Whether the layer is to be taken by tiles, else by pieces: a stage then holds less than a tile.
  __device__ __forceinline__ bool whole_tiles() const { return Resident || (kSpans > 0 && whole_tiles_); }

  // The next tile of the layer.
  __device__ __forceinline__ Tile next_tile() {
    Tile tile = {};
    if (!Resident && part_ == 0) copy_async_wait<kStages - 1>();
    const int first = Resident ? slot_ : used_stage_ * stage_pieces_ + part_;
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      if (span < spans_) tile.v[span] = at(first + span);
    }
    if constexpr (Resident) {
      slot_ += spans_;
    } else {
      end_pieces(spans_);
    }
    return tile;
  }

  // In a ring: the next piece of the layer: span after span of its first tile, then of the next.
  __device__ __forceinline__ Piece next() {
    if (part_ == 0) copy_async_wait<kStages - 1>();
    const Piece piece = at(used_stage_ * stage_pieces_ + part_);
    end_pieces(1);
    return piece;
  }

  // After what the layer has made has been passed on.
  __device__ __forceinline__ void end() {
    if constexpr (!Resident) refill();
  }

 private:
  __device__ __forceinline__ Piece& at(int slot) { return ring_[slot * kChainThreads]; }

  // The pieces of the first tile of a layer, from where they lie.
  __device__ __forceinline__ Tile tile_of(const T* weight) const {
    Tile tile = {};
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      const int k = k_ + span * Pieces<T>::kSpan;
      if (span < spans_ && column_ < width_ && k < width_) {
        tile.v[span] = *reinterpret_cast<const Piece*>(weight + static_cast<std::int64_t>(column_) * width_ + k);
      }
    }
    return tile;
  }

  // In a ring: so many more pieces have been read.
  __device__ __forceinline__ void end_pieces(int pieces) {
    in_layer_ += pieces;
    part_ += pieces;
    const bool layer_ends = in_layer_ == layer_pieces_;
    if (part_ != stage_pieces_ && !layer_ends) return;
    part_ = 0;
    used_stage_ = (used_stage_ + 1) % kStages;
    // The last stage of a layer is refilled when others no longer wait for the layer.
    if (!layer_ends) refill();
  }

  // The next pieces that have not been asked for, into slots from ``slot`` on.
  __device__ __forceinline__ void copy(int pieces, int slot) {
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
      const T* weight = static_cast<const T*>(layers_[layer_]);
      const int column = column_ + tile_ * kTileColumns, k = k_ + span_ * Pieces<T>::kSpan;
      const bool valid = column < width_ && k < width_;
      copy_async(&at(slot + i), valid ? weight + static_cast<std::int64_t>(column) * width_ + k : weight, valid);
      if (++span_ < spans_) continue;
      span_ = 0;
      if (++tile_ * spans_ < layer_pieces_) continue;
      tile_ = 0;
      if (++layer_ == count_) layer_ = 0;
    }
  }

  // The next stage that is not yet under way; past the last one an empty group, so that groups can be counted.
  __device__ __forceinline__ void refill() {
    if (left_ > 0) {
      const int asked = tile_ * spans_ + span_, rest = layer_pieces_ - asked;
      copy(rest < stage_pieces_ ? rest : stage_pieces_, asked_stage_ * stage_pieces_);
      asked_stage_ = (asked_stage_ + 1) % kStages;
      --left_;
    }
    copy_async_commit();
  }

  Piece* ring_;  // the thread's own column of it
  const void* const* layers_;
  int count_, width_, spans_, layer_pieces_, stage_pieces_, column_, k_;
  bool whole_tiles_;
  int layer_ = 0, tile_ = 0, span_ = 0;  // of the next piece to ask for
  int slot_ = 0;                         // resident: of the next piece to use
  bool arrived_ = false;
  int kept_layer_ = 0;
  Tile kept_ = {};
  int left_ = 0, asked_stage_ = 0, used_stage_ = 0, part_ = 0, in_layer_ = 0;  // in the ring
};

// One thread's share of [Rows, 8] += a [Rows, span] @ weights [8, span]^T, by tensor cores: half-precision types.
//
// A piece holds 8 values of k where an instruction wants two pairs 8 apart; in which order k is summed is the same
// for both operands, so pieces of both are taken as they lie. An instruction waits for the last one on its sums, so
// there are two sums for either half of a piece: ``set`` 0 and 1, of even and of odd spans.
template <typename T, int Rows>
class TileSum {
 public:
  __device__ __forceinline__ void add(int set, const Piece& weights, const T* a, int stride) {
    const int g = lane() / 4;
    Piece low = {}, high = {};
    if (g < Rows) low = *reinterpret_cast<const Piece*>(a + g * stride);
    if (Rows > 8) high = *reinterpret_cast<const Piece*>(a + (g + 8) * stride);
    multiply_tile<T>(c_[set][0], {low.v[0], high.v[0], low.v[1], high.v[1]}, {weights.v[0], weights.v[1]});
    multiply_tile<T>(c_[set][1], {low.v[2], high.v[2], low.v[3], high.v[3]}, {weights.v[2], weights.v[3]});
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
  __device__ __forceinline__ void add(int, const Piece& words, const float* a, int stride) {
    const auto piece = bit_cast<Vector<float, 4>>(words);
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
