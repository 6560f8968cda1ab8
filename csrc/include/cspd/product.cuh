// The products of a network block for few rows, with what follows each: bias and SiLU, or bias, gate and residual.
//
// A block makes a tile of [Rows, Columns]; of a swiglu layer it has half as many columns of the output, whose gates are
// the first half of the tile and whose other factors the second. The sum over k is split among its warps, span after
// span of 64 in turn, and a warp copies, keeps and multiplies spans of its own, so that until their sums are added up
// no warp waits for another. Weights are asked for before the kernels before this one have ended, activations after
// (wait_for_earlier). In which order a value's products are added depends on the width alone: its bits are the same in
// every tile.
#pragma once

#include "cspd/block_rows.cuh"

namespace cspd {

constexpr int kProductThreads = 128;
constexpr int kProductWarps = kProductThreads / kWarp;
constexpr int kSpan = 64;             // of k: 128 bytes of a row
constexpr int kRingBytes = 24 << 10;  // of a warp; a block's 96 KiB fit every device, and twice those with most memory
static_assert(kProductWarps * kRingBytes <= 99 << 10, "the least that a block may have from 8.0 on");
constexpr int kSumsPad = 8;  // floats between rows of sums: other banks

template <typename T, int Rows, int Columns, bool Swiglu>
class ProductTile {
  static_assert(sizeof(T) == 2 && Rows % 16 == 0 && Columns % 16 == 0);
  static constexpr int kOut = Swiglu ? Columns / 2 : Columns;  // columns of the output
  // Of a span at a time: all of it, or half where two stages of it are too large.
  static constexpr int kDepth = 2 * (Rows + Columns) * kSpan * 2 <= kRingBytes ? kSpan : kSpan / 2;
  static constexpr int kParts = kSpan / kDepth;
  static constexpr int kPieces = kDepth / 8;       // of 16 bytes
  static constexpr int kAtOnce = kWarp / kPieces;  // rows that a warp copies
  static constexpr int kStageBytes = (Rows + Columns) * kDepth * 2;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kStages >= 2);
  static constexpr int kSumsStride = Columns + kSumsPad;
  static_assert(Rows * kSumsStride * 4 <= kRingBytes);
  static constexpr int kFours = Rows * kOut / 4;  // neighbouring values that a thread ends together
  static constexpr int kOwnFours = (kFours + kProductThreads - 1) / kProductThreads;
  static constexpr bool kEarly = kOwnFours <= 2;  // whether there are registers for what ends them beside the sums

 public:
  __device__ __forceinline__ explicit ProductTile(const Product& product)
      : product_(product), ring_(shared_memory<unsigned char>() + warp() * kRingBytes) {
    const std::int64_t row_tiles = (product.rows + Rows - 1) / Rows;  // neighbours share weights
    first_row_ = blockIdx.x % row_tiles * Rows;
    first_column_ = static_cast<int>(blockIdx.x / row_tiles) * kOut;
    count_ = ((product.inner + kSpan - 1) / kSpan + kProductWarps - 1) / kProductWarps * kParts;
    // Of the rows that this lane copies the first, which may already be beyond the matrix.
    const std::int64_t row = first_row_ + lane() / kPieces;
    const int column = first_column_ + lane() / kPieces;
    rows_left_ = product.rows - row < Rows ? static_cast<int>(product.rows - row) : Rows;
    columns_left_ = product.columns - column;
    operand_ = static_cast<const T*>(product.operand) + (rows_left_ > 0 ? row : 0) * product.inner;
    weight_ = static_cast<const T*>(product.weight) +
              static_cast<std::int64_t>(columns_left_ > 0 ? column : 0) * product.inner;
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) copy_weights(stage, stage);
    if (kEarly) load_biases();
    wait_for_earlier();
    if (idle(product_.live)) {
      copy_async_commit();
      copy_async_wait<0>();  // copies that are under way write to this block's memory
      return;
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      copy_operand(stage, stage);
      copy_async_commit();
    }
    if (kEarly && !Swiglu && product_.h) load_residual();
    look_ahead();
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count_; ++i) {
      copy_async_wait<kStages - 1>();
      sync_warp();  // the copies of all lanes
      multiply(stage);
      sync_warp();  // all lanes have read them
      copy_weights(stage, i + kStages);
      copy_operand(stage, i + kStages);
      copy_async_commit();
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    copy_async_wait<0>();  // nothing comes any more where the sums go
    sync_warp();
    leave_sums();
    if (!kEarly) load_biases();
    if (!kEarly && !Swiglu && product_.h) load_residual();
    sync_block();
    finish();
  }

 private:
  // Where a piece of a row lies in a stage: the pieces of a row change places so that the same piece of eight rows is
  // in eight groups of banks.
  static __device__ __forceinline__ int place(int row, int piece) {
    const int exchanged = kParts == 1 ? row & 7 : row >> 1 & 3;
    return row * kDepth * 2 + (piece ^ exchanged) * 16;
  }

  // So many rows from k on, ``left`` of which there are from this lane's first on; beyond the matrix, zeros.
  template <int Count>
  __device__ __forceinline__ void copy(unsigned char* to, const T* from, int left, int k) {
    from += k;
#pragma unroll
    for (int i = 0; i < Count / kAtOnce; ++i) {
      const bool valid = k < product_.inner && kAtOnce * i < left;
      const std::int64_t offset = static_cast<std::int64_t>(kAtOnce * i) * product_.inner;
      copy_async(to + place(i * kAtOnce + lane() / kPieces, lane() % kPieces), from + offset, valid);
    }
  }

  // ``part`` counts this warp's own parts of spans.
  __device__ __forceinline__ int k_of(int part) const {
    return (part / kParts * kProductWarps + warp()) * kSpan + part % kParts * kDepth + lane() % kPieces * 8;
  }

  __device__ __forceinline__ void copy_operand(int stage, int part) {
    copy<Rows>(ring_ + stage * kStageBytes, operand_, rows_left_, k_of(part));
  }

  __device__ __forceinline__ void copy_weights(int stage, int part) {
    unsigned char* to = ring_ + stage * kStageBytes + Rows * kDepth * 2;
    copy<kOut>(to, weight_, columns_left_, k_of(part));
    if constexpr (Swiglu) {
      static_assert(kOut % 8 == 0, "columns beyond this exchange their pieces as those before it");
      const std::int64_t others = static_cast<std::int64_t>(product_.columns) * product_.inner;
      copy<kOut>(to + place(kOut, 0), weight_ + others, columns_left_, k_of(part));
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char *rows = ring_ + stage * kStageBytes, *columns = rows + Rows * kDepth * 2;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      std::uint32_t a[Rows / 16][4], b[Columns / 16][4];
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
        load_matrices(a[i], rows + place(16 * i + lane() % 16, 2 * k + lane() / 16));
      }
#pragma unroll
      for (int i = 0; i < Columns / 16; ++i) {
        load_matrices(b[i], columns + place(16 * i + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < Columns / 8; ++j) {
          multiply_tile<T>(sums_[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
        }
      }
    }
  }

  __device__ __forceinline__ void leave_sums() {
    auto* out = reinterpret_cast<float*>(ring_);
    const int g = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int i = 0; i < Rows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Columns / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Vector<float, 2> two = {{sums_[i][j][2 * half], sums_[i][j][2 * half + 1]}};
          *reinterpret_cast<Vector<float, 2>*>(out + (16 * i + 8 * half + g) * kSumsStride + 8 * j + 2 * q) = two;
        }
      }
    }
  }

  // The thread's fours of the tile, those that there are: ``use`` with their number and place.
  template <typename Use>
  __device__ __forceinline__ void for_fours(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kOwnFours; ++i) {
      const int four = static_cast<int>(threadIdx.x) + i * kProductThreads;
      const int row = four / (kOut / 4), column = four % (kOut / 4) * 4;
      if (four >= kFours || first_row_ + row >= product_.rows || first_column_ + column >= product_.columns) continue;
      use(i, row, column);
    }
  }

  __device__ __forceinline__ void load_biases() {
    for_fours([&](int i, int, int column) {
      const T* bias = static_cast<const T*>(product_.bias) + first_column_ + column;
      biases_[i] = load_four(bias);
      if constexpr (Swiglu) other_biases_[i] = load_four(bias + product_.columns);
    });
  }

  // h and gates, on their way while sums are made.
  __device__ __forceinline__ void load_residual() {
    for_fours([&](int i, int row, int column) {
      const std::int64_t at = first_row_ + row;
      before_[i] = load_four(product_.h + at * product_.columns + first_column_ + column);
      gates_[i] = *reinterpret_cast<const Vector<T, 4>*>(static_cast<const T*>(product_.mods) +
                                                         (3 * at + 2) * product_.columns + first_column_ + column);
    });
  }

  __device__ __forceinline__ void look_ahead() const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= Rows || first_row_ + row >= product_.rows) return;
    prefetch_ahead<T>(product_.ahead, first_row_ + row, first_column_);
  }

  // The sums of all warps, added to ``value``.
  static __device__ __forceinline__ Vector<float, 4> total(Vector<float, 4> value, int row, int column) {
    const auto* sums = shared_memory<float>();
#pragma unroll
    for (int w = 0; w < kProductWarps; ++w) {
      const auto part = load_four(sums + w * kRingBytes / 4 + row * kSumsStride + column);
#pragma unroll
      for (int k = 0; k < 4; ++k) value.v[k] += part.v[k];
    }
    return value;
  }

  __device__ __forceinline__ void finish() {
    for_fours([&](int i, int row, int column) {
      auto value = total(biases_[i], row, column);
      const std::int64_t at = (first_row_ + row) * product_.columns + first_column_ + column;
      if constexpr (Swiglu) {
        const auto other = total(other_biases_[i], row, kOut + column);
#pragma unroll
        for (int k = 0; k < 4; ++k) value.v[k] = silu(value.v[k]) * other.v[k];
        store_four(static_cast<T*>(product_.activations) + at, value);
      } else if (product_.h) {
#pragma unroll
        for (int k = 0; k < 4; ++k) value.v[k] = fmaf(to_float(gates_[i].v[k]), value.v[k], before_[i].v[k]);
        store_four(product_.h + at, value);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) value.v[k] = silu(value.v[k]);
        store_four(static_cast<T*>(product_.activations) + at, value);
      }
    });
  }

  const Product& product_;
  unsigned char* ring_;
  const T *operand_, *weight_;
  std::int64_t first_row_;
  int first_column_, rows_left_, columns_left_, count_;  // the last: parts of spans of a warp
  float sums_[Rows / 16][Columns / 8][4] = {};
  Vector<float, 4> biases_[kOwnFours], before_[kOwnFours], other_biases_[Swiglu ? kOwnFours : 1];
  Vector<T, 4> gates_[kOwnFours];
};

template <typename T, int Rows, int Columns, bool Swiglu>
__global__ void __launch_bounds__(kProductThreads, Rows* Columns > 2048 ? 2 : 3) product_kernel(Product product) {
  ProductTile<T, Rows, Columns, Swiglu>(product).run();
}

}  // namespace cspd
