// The kernels of the layered denoising chain but its products: those are a library's, or product.cuh's.
//
// They are launched early (wait_for_earlier), with the weights they need asked for before they wait; not the condition,
// nor the input of a chain's first step, so that weights may be new when a chain starts.
#pragma once

#include "cspd/block_rows.cuh"

namespace cspd {

constexpr int kElementThreads = 256;

// out [steps, rows, W] = silu(time_embedding [steps, W] + y [rows, W]): what every modulation is a projection of. Of
// one step rows may have embeddings of their ``own``, [rows, W].
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    condition_kernel(const T* y, const float* time_embedding, T* out, int rows, int width, bool own,
                     std::int64_t chunks) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const std::int64_t row = chunk * kOwn / width;
  const int column = static_cast<int>(chunk * kOwn % width);
  const std::int64_t step = row / rows;
  const auto time = load_packed(time_embedding + (own ? row : step) * width + column);
  const auto condition = load_packed(y + (row - step * rows) * width + column);
  Eight value;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) value.v[i] = silu(time[i] + condition[i]);
  store_eight(out + chunk * kOwn, value);
}

// value [rows, H] = silu(value + bias [H]), in place.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    bias_silu_kernel(T* value, const T* bias, Ahead ahead, int hidden, std::int64_t chunks, const std::int32_t* live) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  const int column = chunk < chunks ? static_cast<int>(chunk * kOwn % hidden) : 0;
  const auto added = load_packed(bias + column);
  wait_for_earlier();
  if (chunk >= chunks || idle(live)) return;
  const auto before = load_packed(value + chunk * kOwn);
  prefetch_ahead<T>(ahead, chunk * kOwn / hidden, column);
  Eight now;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) now.v[i] = silu(before[i] + added[i]);
  store_eight(value + chunk * kOwn, now);
}

// Of value [rows, 2 H] the first H columns = silu(they + bias) (the other H + bias), bias [2 H], in place.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) bias_swiglu_kernel(T* value, const T* bias, Ahead ahead, int hidden,
                                                                      std::int64_t chunks, const std::int32_t* live) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  const int column = chunk < chunks ? static_cast<int>(chunk * kOwn % hidden) : 0;
  const auto to_gate = load_packed(bias + column), to_other = load_packed(bias + hidden + column);
  wait_for_earlier();
  if (chunk >= chunks || idle(live)) return;
  const std::int64_t row = chunk * kOwn / hidden;
  T* at = value + 2 * row * hidden + column;
  const auto gate = load_packed(at), other = load_packed(at + hidden);
  prefetch_ahead<T>(ahead, row, column);
  Eight now;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) now.v[i] = silu(gate[i] + to_gate[i]) * (other[i] + to_other[i]);
  store_eight(at, now);
}

// h of the first layer from x [N, C] and weight [C, W], for all groups, and the first block's operand.
// A block has ``Tokens``, which share its reading of the weights: these are a copy that the chain makes.
template <typename T, typename Out, int Tokens>
__global__ void __launch_bounds__(Tokens == 1 ? kMostThreads : kSharedWidth / kOwn, Tokens == 1 ? 1 : 0)
    input_kernel(const float* x, const float* weight, const float* bias, float* h, Modulation<T> modulation,
                 Out* operand, std::int64_t tokens, int groups, int channels, int width, std::int64_t period,
                 const std::int32_t* live) {
  float* scratch = shared_memory<float>();
  float* of_tokens = scratch + statistics_floats(Tokens);  // [Tokens, C]
  const RowSpread spread(width, modulation.rms);
  const bool mine = spread.mine();
  const int column = own_column();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * Tokens;
  const int count = tokens - first < Tokens ? static_cast<int>(tokens - first) : Tokens;
  const Affine affine(modulation, mine);
  Eight rows[Tokens] = {};
  if (mine) {
    const auto biases = load_packed(bias + column);
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) rows[t].v[i] = biases[i];
    }
  }
  wait_for_earlier();
  if (idle(live)) return;
  for (int i = static_cast<int>(threadIdx.x); i < Tokens * channels; i += static_cast<int>(blockDim.x)) {
    of_tokens[i] = i < count * channels ? x[first * channels + i] : 0.0f;
  }
  sync_block();
  if (mine) {
#pragma unroll 4
    for (int c = 0; c < channels; ++c) {
      const auto weights = load_packed(weight + static_cast<std::int64_t>(c) * width + column);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) rows[t].v[i] = fmaf(of_tokens[t * channels + c], weights[i], rows[t].v[i]);
      }
    }
  }
  const auto row_of = [&](int t) { return row_of_token(first + t, period, groups); };
  RowModulation<T> mods[Tokens] = {};
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    if (mine && t < count) mods[t] = {modulation, row_of(t), width};
  }
  Statistics statistics[Tokens];
  statistics_of(rows, spread, modulation.epsilon, scratch, statistics);
  if (!mine) return;
  for (int group = 0; group < groups; ++group) {
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      if (t >= count) continue;
      const std::int64_t row = row_of(t) + group * period;
      if (group > 0) mods[t] = {modulation, row, width};
      store_eight(h + row * width + column, rows[t]);
      store_eight(operand + row * width + column, mods[t].apply(rows[t], affine, statistics[t]));
    }
  }
}

// h += gate (product + bias), where there is a product, and the next layer's operand from h. A block a row; the gate is
// the third column block of ``mods`` [rows, 3 W].
template <typename T, typename Out>
__global__ void __launch_bounds__(kMostThreads)
    residual_kernel(const T* product, const T* bias, const T* mods, float* h, Modulation<T> next, Out* operand,
                    int width, const std::int32_t* live) {
  float* scratch = shared_memory<float>();
  const RowSpread spread(width, next.rms);
  const bool mine = spread.mine();
  const int column = own_column();
  const std::int64_t row = blockIdx.x, at = row * width + column;
  const Affine affine(next, mine);
  Packed<T> added = {};
  if (mine && product) added = load_packed(bias + column);
  wait_for_earlier();
  if (idle(live)) return;
  RowModulation<T> modulation = {};
  Eight of_row[1] = {};
  if (mine) {
    modulation = {next, row, width};
    const auto before = load_packed(h + at);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) of_row[0].v[i] = before[i];
    if (product) {
      const auto value = load_packed(product + at);
      const auto gate = load_packed(mods + (3 * row + 2) * width + column);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) of_row[0].v[i] = fmaf(gate[i], value[i] + added[i], of_row[0].v[i]);
      store_eight(h + at, of_row[0]);
    }
  }
  Statistics statistics[1];
  statistics_of(of_row, spread, next.epsilon, scratch, statistics);
  if (mine) store_eight(operand + at, modulation.apply(of_row[0], affine, statistics[0]));
}

}  // namespace cspd
