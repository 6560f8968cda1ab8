// The values of a layer that one block of the persistent kernel makes, in the order in which its threads take them.
#pragma once

#include "cspd/weights.cuh"

namespace cspd {

struct Item {
  int index, row, c, column;  // ``column`` is that of the layer, ``c`` the block's
};

class Items {
 public:
  // Divides, which takes long: what a thread begins and goes on with is found out once.
  __device__ __forceinline__ Items(int rows, int columns, int first_column, int width)
      : count_(rows * columns),
        columns_(columns),
        first_column_(first_column),
        width_(width),
        row_step_(kChainThreads / columns),
        c_step_(kChainThreads % columns) {
    const int index = static_cast<int>(threadIdx.x);
    first_ = item(index, index / columns, index % columns);
  }

  // Of this thread, perhaps beyond the last one.
  __device__ __forceinline__ const Item& first() const { return first_; }

  __device__ __forceinline__ bool exists(const Item& i) const { return i.index < count_ && i.column < width_; }

  // ``use`` with every item of this thread that there is.
  template <typename Use>
  __device__ __forceinline__ void for_each(const Use& use) const {
    for (Item i = first_; i.index < count_; i = next(i)) {
      if (i.column < width_) use(i);
    }
  }

 private:
  __device__ __forceinline__ Item item(int index, int row, int c) const { return {index, row, c, first_column_ + c}; }

  __device__ __forceinline__ Item next(const Item& i) const {
    const int c = i.c + c_step_, over = c >= columns_;
    return item(i.index + kChainThreads, i.row + row_step_ + over, over ? c - columns_ : c);
  }

  int count_, columns_, first_column_, width_, row_step_, c_step_;
  Item first_;
};

// The sum of what the warps have of a value, ``stride`` apart, and ``more``: in short chains.
__device__ __forceinline__ float sum_of_warps(const float* values, int stride, float more) {
  static_assert(kChainWarps == 8);
  float v[kChainWarps];
#pragma unroll
  for (int w = 0; w < kChainWarps; ++w) v[w] = values[w * stride];
  return (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) + more;
}

// Ask for memory that every block is to read, each block for some of its lines.
__device__ __forceinline__ void prefetch_together(const void* at, std::int64_t bytes) {
  constexpr int kLine = 128;
  const auto* start = static_cast<const unsigned char*>(at);
  const std::int64_t blocks = gridDim.x;
  for (std::int64_t i = blockIdx.x + blocks * threadIdx.x; i * kLine < bytes; i += blocks * kChainThreads) {
    prefetch_line(start + i * kLine);
  }
}

}  // namespace cspd
