// h of a step's start, of whole rows, by every block for itself: the input projection with weights that stay in
// registers, so that h need not be passed between blocks.
#pragma once

#include "cspd/row_group.cuh"

namespace cspd {

// One thread's part: of the columns that it has of a RowGroup of one chunk.
class StepStart {
 public:
  __device__ __forceinline__ void load(const Ends& ends, int channels, int width) {
    channels_ = channels;
    bias_ = {};
#pragma unroll
    for (int c = 0; c < kHeld; ++c) weights_[c] = {};
    const int column = RowGroup<1, 1>::column(0);
    if (column >= width) return;
    bias_ = load_four(ends.input_bias + column);
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
      if (c < channels) weights_[c] = weights_of(ends, column, c);
    }
  }

  // The rows of ``x`` [tokens, stride], whose channels beyond the last are 0 up to kHeld; the second half of the rows
  // under guidance is the first again.
  template <int Rows>
  __device__ __forceinline__ void project(RowGroup<Rows, 1>& h, const Ends& ends, const float* x, int stride,
                                          int tokens, int rows, int width) const {
    const int column = RowGroup<1, 1>::column(0);
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      h.v[row][0] = {};
      if (row >= rows || column >= width) continue;
      const float* of_token = x + (row < tokens ? row : row - tokens) * stride;
      auto sum = bias_;
#pragma unroll
      for (int c = 0; c < kHeld; c += 4) {
        const auto four = load_four(of_token + c);
#pragma unroll
        for (int k = 0; k < 4; ++k) add(sum, four.v[k], weights_[c + k]);
      }
      for (int c = kHeld; c < channels_; ++c) add(sum, of_token[c], weights_of(ends, column, c));  // rare
      h.v[row][0] = sum;
    }
  }

 private:
  static constexpr int kHeld = 16;  // channels

  static __device__ __forceinline__ void add(Vector<float, 4>& sum, float x, const Vector<float, 4>& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.v[i] = fmaf(x, weights.v[i], sum.v[i]);
  }

  __device__ __forceinline__ Vector<float, 4> weights_of(const Ends& ends, int column, int channel) const {
    Vector<float, 4> weights;
#pragma unroll
    for (int i = 0; i < 4; ++i) weights.v[i] = ends.input_weight[(column + i) * channels_ + channel];
    return weights;
  }

  Vector<float, 4> weights_[kHeld], bias_;
  int channels_;
};

}  // namespace cspd
