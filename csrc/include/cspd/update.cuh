// The end of a reverse step: final layer, guidance, the update rule, noise.
//
// A warp makes ``Tokens`` x ``Channels`` of them, its lanes side by side along k: each row of the weights that it reads
// serves all of its tokens, each row of the operand all of its channels, and neighbouring warps of a block meet the
// same rows in the first-level cache. A token's sums are added up in the same order whatever the tile.
#pragma once

#include "cspd/philox.cuh"
#include "cspd/rows.cuh"
#include "cspd/step.cuh"

namespace cspd {

// For each of ``Count`` values (1, 2, 4, ... 32) the sum over the warp: lane l has that of value l / (32 / Count).
template <int Distance = kWarp / 2, int Count>
__device__ __forceinline__ float sums_over_warp(const float (&values)[Count]) {
  if constexpr (Distance == 0) {
    return values[0];
  } else if constexpr (Count == 1) {
    return sums_over_warp<Distance / 2>({values[0] + shuffle_xor(values[0], Distance)});
  } else {
    const bool upper = lane() & Distance;  // this lane keeps the upper half of the values, and gives the lower one away
    float kept[Count / 2];
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      const float low = values[i], high = values[i + Count / 2];
      kept[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, Distance);
    }
    return sums_over_warp<Distance / 2>(kept);
  }
}

// What the final layer is made of.
struct FinalRows {
  const float *operand, *weight;
  std::int64_t tokens, period;
  int groups, channels, width;
  bool learned;
};

__device__ __forceinline__ FinalRows final_rows(const Update& update) {
  return {update.operand, update.ends.final_weight, update.tokens, update.tokens,
          update.groups,  update.channels,          update.width,  update.learned};
}

__device__ __forceinline__ FinalRows final_rows(const NetworkOutput& to) {
  return {to.operand, to.final_weight, to.tokens, to.period, to.groups, to.channels, to.width, to.v != nullptr};
}

// A warp's share of the final layer, of one group or two, or (``Groups`` 3) of three. Rows and columns that there are
// not are the last ones once more.
template <int Tokens, int Channels, int Groups>
struct FinalLayer {
  static_assert(Groups == 2 || Groups == 3);
  static constexpr int kCount = Tokens * Channels;
  float of[Groups][kCount] = {}, v[kCount] = {};  // [Tokens, Channels]

  __device__ __forceinline__ void run(const FinalRows& rows, std::int64_t first_token, int first_channel) {
    const float *operands[Tokens], *weights[Channels];
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      const std::int64_t token = first_token + t < rows.tokens ? first_token + t : rows.tokens - 1;
      operands[t] = rows.operand + row_of_token(token, rows.period, groups_of(rows)) * rows.width;
    }
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      const int channel = first_channel + c < rows.channels ? first_channel + c : rows.channels - 1;
      weights[c] = rows.weight + static_cast<std::int64_t>(channel) * rows.width;
    }
    const std::int64_t to_v = static_cast<std::int64_t>(rows.channels) * rows.width;
    const std::int64_t to_next = rows.period * rows.width;
    [[maybe_unused]] constexpr int kUnroll = kCount == 1 ? 4 : kCount <= 4 ? 2 : 1;
#pragma unroll kUnroll
    for (int column = 4 * lane(); column < rows.width; column += 4 * kWarp) {
      Vector<float, 4> of_x0[Channels], of_v[Channels] = {}, a[Groups][Tokens] = {};
#pragma unroll
      for (int c = 0; c < Channels; ++c) of_x0[c] = load_four(weights[c] + column);
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        if (rows.learned) of_v[c] = load_four(weights[c] + to_v + column);
      }
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          if (g < groups_of(rows)) a[g][t] = load_four(operands[t] + g * to_next + column);
        }
      }
      add(of[0], a[0], of_x0);
      if (rows.learned) add(v, a[0], of_v);
#pragma unroll
      for (int g = 1; g < Groups; ++g) {
        if (g < groups_of(rows)) add(of[g], a[g], of_x0);
      }
    }
  }

  // Of the lane that has the sums of a token and channel: see sums_over_warp.
  __device__ __forceinline__ Output output(const Output& bias, const FinalRows& rows) const {
    Output out = {};
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      if (g < groups_of(rows)) out.of[g] = sums_over_warp(of[g]) + bias.of[g];
    }
    if (rows.learned) out.v = sums_over_warp(v) + bias.v;
    return out;
  }

 private:
  static __device__ __forceinline__ int groups_of(const FinalRows& rows) { return Groups == 3 ? 3 : rows.groups; }

  static __device__ __forceinline__ void add(float (&sums)[kCount], const Vector<float, 4> (&rows)[Tokens],
                                             const Vector<float, 4> (&weights)[Channels]) {
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[t * Channels + c] = fmaf(rows[t].v[i], weights[c].v[i], sums[t * Channels + c]);
        }
      }
    }
  }
};

// What a lane of a warp ends, of the final layer's tiles of [Tokens, Channels].
template <int Tokens, int Channels, int Groups, int Threads>
struct FinalTile {
  std::int64_t first_token, token, at;  // ``at``: in [N, C]
  int first_channel, channel;
  bool mine;

  __device__ __forceinline__ FinalTile(std::int64_t tokens, int channels) {
    constexpr int kLanes = kWarp / (Tokens * Channels);
    const int across = (channels + Channels - 1) / Channels, own = lane() / kLanes;  // tiles
    const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * (Threads / kWarp) + warp();
    first_token = tile / across * Tokens;
    first_channel = static_cast<int>(tile % across) * Channels;
    channel = first_channel + own % Channels;
    token = first_token + own / Channels;
    at = token * channels + channel;
    mine = lane() % kLanes == 0 && token < tokens && channel < channels;
  }

  __device__ __forceinline__ Output bias(const float* biases, int channels, bool learned) const {
    Output bias = {};
    if (!mine) return bias;
    for (float& of_group : bias.of) of_group = biases[channel];
    if (learned) bias.v = biases[channels + channel];
    return bias;
  }

  // Of this lane; every lane of the warp calls it.
  __device__ __forceinline__ Output run(const FinalRows& rows, const Output& bias) const {
    FinalLayer<Tokens, Channels, Groups> layer;
    layer.run(rows, first_token, first_channel);
    return layer.output(bias, rows);
  }
};

template <int Tokens, int Channels, int Groups, int Threads>
__global__ void __launch_bounds__(Threads) update_kernel(Update update) {
  const FinalTile<Tokens, Channels, Groups, Threads> tile(update.tokens, update.channels);
  const Output bias = tile.bias(update.ends.final_bias, update.channels, update.learned);
  wait_for_earlier();
  if (idle(update.live)) return;
  // On their way while the final layer is made.
  const bool last = update.step == 0, stored = update.noise.noise != nullptr;
  float x = 0.0f, scales[kMostGroups - 1] = {}, noise = 0.0f;
  std::uint64_t seed = 0;
  std::int64_t address = 0;
  StepTable table = {};
  Limits limits;
  if (tile.mine) {
    x = update.x[tile.at];
#pragma unroll
    for (int g = 0; g < Groups - 1; ++g) {
      if (g < update.groups - 1) scales[g] = update.scale[g * update.tokens + tile.token];
    }
    table = *update.table;
    limits = {update.clip, tile.channel, update.channels};
    if (!last && stored) noise = update.noise.noise[update.step * update.noise.stride + tile.at];
    if (!last && !stored) {
      seed = static_cast<std::uint64_t>(*update.noise.seed);
      address = update.noise.addresses[tile.token];
    }
  }
  const Output out = tile.run(final_rows(update), bias);
  if (!tile.mine) return;
  if (!last && !stored) noise = normal_at(seed, address, update.step, tile.channel, kStreamStep);
  const Step step = reverse_step(x, guided_output<Groups>(out, update.groups, scales), out.v, table, update.learned,
                                 limits, *update.temperature, noise, last);
  update.x[tile.at] = step.x;
  if (last) {
    update.log_std[tile.at] = step.log_std;
  } else {
    update.path[tile.at] += step.log_std;
  }
}

// The final layer alone.
template <int Tokens, int Channels, int Groups, int Threads>
__global__ void __launch_bounds__(Threads) output_kernel(NetworkOutput to) {
  const FinalTile<Tokens, Channels, Groups, Threads> tile(to.tokens, to.channels);
  const Output bias = tile.bias(to.final_bias, to.channels, to.v != nullptr);
  wait_for_earlier();
  if (idle(to.live)) return;
  const Output out = tile.run(final_rows(to), bias);
  if (!tile.mine) return;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    if (g < to.groups) to.out[g * to.tokens * to.channels + tile.at] = out.of[g];
  }
  if (to.v) to.v[tile.at] = out.v;
}

}  // namespace cspd
