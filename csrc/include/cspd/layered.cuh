// The elementwise kernels of the layered denoising chain; the products between them are a library's.
#pragma once

#include "cspd/philox.cuh"
#include "cspd/posterior.cuh"
#include "cspd/rows.cuh"

namespace cspd {

constexpr int kElementThreads = 256;

// out [steps, rows, W] = silu(time_embedding [steps, W] + y [rows, W]): what every modulation is a projection of.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    condition_kernel(const T* y, const float* time_embedding, T* out, int rows, int width, std::int64_t chunks) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const std::int64_t row = chunk * 4 / width;
  const int column = static_cast<int>(chunk * 4 % width);
  const auto time = load_four(time_embedding + row / rows * width + column);
  auto value = load_four(y + row % rows * width + column);
#pragma unroll
  for (int i = 0; i < 4; ++i) value.v[i] = silu(time.v[i] + value.v[i]);
  store_four(out + chunk * 4, value);
}

// value [rows, W] = silu(value + bias [W]), in place.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    bias_silu_kernel(T* value, const T* bias, int width, std::int64_t chunks) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const auto added = load_four(bias + chunk * 4 % width);
  auto now = load_four(value + chunk * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) now.v[i] = silu(now.v[i] + added.v[i]);
  store_four(value + chunk * 4, now);
}

// h of the first layer from x [N, C] and weight [C, W], for both halves under guidance, and the first block's operand.
// A block a token.
template <typename T, typename Out>
__global__ void __launch_bounds__(kRowThreads)
    input_kernel(const float* x, const float* weight, const float* bias, float* h, Modulation<T> modulation,
                 Out* operand, std::int64_t tokens, int halves, int channels, int width) {
  float* scratch = shared_memory<float>();
  const RowShape<kRowThreads> shape(width);
  const std::int64_t token = blockIdx.x;
  RowPart<kRowThreads> row = {};
#pragma unroll
  for (int chunk = 0; chunk < row.kChunks; ++chunk) {
    const int column = row.column(chunk);
    if (column < width) row.v[chunk] = projected(x + token * channels, weight, bias, channels, column, width);
  }
  const auto statistics = row_statistics(row, shape, width, modulation.epsilon, scratch);
  for (int half = 0; half < halves; ++half) {
    const std::int64_t to = token + half * tokens;
    const ModulationPart<kRowThreads, T> mods(modulation, to, width);
#pragma unroll
    for (int chunk = 0; chunk < row.kChunks; ++chunk) {
      const int column = row.column(chunk);
      if (column >= width) continue;
      store_four(h + to * width + column, row.v[chunk]);
      store_four(operand + to * width + column, mods.apply(chunk, row.v[chunk], statistics));
    }
  }
}

// h += gate (product + bias), and the next layer's operand from the new h. A block a row; the gate is the third
// column block of ``mods`` [rows, 3 W].
template <typename T, typename Out>
__global__ void __launch_bounds__(kRowThreads) residual_kernel(const T* product, const T* bias, const T* mods, float* h,
                                                               Modulation<T> next, Out* operand, int width) {
  float* scratch = shared_memory<float>();
  const RowShape<kRowThreads> shape(width);
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * width;
  RowPart<kRowThreads> row = {};
  const ModulationPart<kRowThreads, T> early(next, blockIdx.x, width);
#pragma unroll
  for (int chunk = 0; chunk < row.kChunks; ++chunk) {
    const int column = row.column(chunk);
    if (column >= width) continue;
    const auto value = load_four(product + start + column), added = load_four(bias + column);
    const auto gate = load_four(mods + 3 * start + 2 * width + column);
    row.v[chunk] = load_four(h + start + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) row.v[chunk].v[i] = fmaf(gate.v[i], value.v[i] + added.v[i], row.v[chunk].v[i]);
    store_four(h + start + column, row.v[chunk]);
  }
  const auto statistics = row_statistics(row, shape, width, next.epsilon, scratch);
#pragma unroll
  for (int chunk = 0; chunk < row.kChunks; ++chunk) {
    const int column = row.column(chunk);
    if (column >= width) continue;
    store_four(operand + start + column, early.apply(chunk, row.v[chunk], statistics));
  }
}

// The final layer of one channel: eps and v of the conditional row, eps of the unconditional one, in every lane.
template <int Tokens>
__device__ __forceinline__ void final_layer(const Update& update, std::int64_t first, int count, int channel,
                                            Output (&out)[Tokens]) {
  const float* eps_weight = update.ends.final_weight + static_cast<std::int64_t>(channel) * update.width;
  const float* v_weight = eps_weight + static_cast<std::int64_t>(update.channels) * update.width;
#pragma unroll
  for (int t = 0; t < Tokens; ++t) out[t] = {0.0f, 0.0f, 0.0f};
  for (int column = 4 * lane(); column < update.width; column += 4 * kWarp) {
    const auto for_eps = load_four(eps_weight + column);
    const auto for_v = update.learned ? load_four(v_weight + column) : Vector<float, 4>{};
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      if (t >= count) continue;
      const auto a = load_four(update.operand + (first + t) * update.width + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[t].eps = fmaf(a.v[i], for_eps.v[i], out[t].eps);
        out[t].v = fmaf(a.v[i], for_v.v[i], out[t].v);
      }
      if (update.scale) {
        const auto u = load_four(update.operand + (update.tokens + first + t) * update.width + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t].eps_u = fmaf(u.v[i], for_eps.v[i], out[t].eps_u);
      }
    }
  }
  const float bias = update.ends.final_bias[channel];
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    out[t].eps = sum_over<kWarp>(out[t].eps) + bias;
    out[t].v = sum_over<kWarp>(out[t].v) + (update.learned ? update.ends.final_bias[update.channels + channel] : 0.0f);
    out[t].eps_u = sum_over<kWarp>(out[t].eps_u) + bias;
  }
}

// End of a reverse step: final layer, guidance, posterior, noise. ``Tokens`` a block, a warp a channel.
template <int Tokens>
__global__ void __launch_bounds__(kRowThreads, 2) update_kernel(Update update) {
  float* log_stds = shared_memory<float>();  // [Tokens, C]
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * Tokens;
  const std::int64_t left = update.tokens - first;
  const int count = left < Tokens ? static_cast<int>(left) : Tokens, channels = update.channels;
  for (int channel = warp(); channel < channels; channel += kRowWarps) {
    Output out[Tokens];
    final_layer(update, first, count, channel, out);
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      if (t >= count || lane() != t) continue;
      const std::int64_t token = first + t, at = token * channels + channel;
      const float noise = update.step > 0 ? noise_at(update.noise, update.step, token, channel, channels) : 0.0f;
      const float scale = update.scale ? update.scale[token] : 1.0f;
      const Step step = reverse_step(update.x[at], out[t], *update.table, update.scale != nullptr, scale,
                                     *update.temperature, noise, update.step == 0);
      update.x[at] = step.x;
      if (update.step == 0) update.log_std[at] = step.log_std;
      log_stds[t * channels + channel] = step.log_std;
    }
  }
  sync_block();
  const int t = static_cast<int>(threadIdx.x);
  if (update.step > 0 && t < count) {
    float sum = 0.0f;
    for (int channel = 0; channel < channels; ++channel) sum += log_stds[t * channels + channel];
    update.path[first + t] += sum;
  }
}

}  // namespace cspd
