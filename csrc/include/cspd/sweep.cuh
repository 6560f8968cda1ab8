// Sweeps over all steps of a chain at once: the recursion, and which tokens have settled. What they compute is
// cspd_kernels/ops/denoise/reference.py's.
#pragma once

#include <cfloat>

#include "cspd/device.cuh"
#include "cspd/step.cuh"

namespace cspd {

constexpr int kSweepThreads = 256;
constexpr int kSweepChannels = 16;  // of a block, at most
constexpr int kSweepSteps = 128;    // of a chunk, whose values are in shared memory together
constexpr int kQuad = 4;            // channels that share one draw of Philox
constexpr int kSettleThreads = 256;

// The larger one; NaN where one is.
CSPD_HD float larger(float a, float b) { return b > a || b != b ? b : a; }

// The secant of x0 through two sweeps, limited to [0, 1]: it is never negative where x0 is a posterior mean.
CSPD_HD float slope_of(float x0, float x0_before, float x, float x_before) {
  const float moved = x - x_before, slope = (x0 - x0_before) / moved;
  if (moved == 0.0f || !(slope > 0.0f)) return 0.0f;  // not where it is NaN, either
  return fminf(slope, 1.0f);
}

// What the recursion needs of a step and a channel.
struct StepOfSweep {
  float x, x0, slope, noise, log_std;  // input, x0 there and its slope, noise with its sigma
};

// So many floats of shared memory: chunks of StepOfSweep, field by field, and two coefficients a step.
constexpr CSPD_HD int sweep_floats(int steps, int channels) { return steps * (5 * channels + 2); }

// A chunk of steps in shared memory.
struct SweepChunk {
  float *x, *x0, *slope, *noise, *log_std;  // [steps, group]
  float *mean_x0, *mean_x;                  // [steps]

  __device__ __forceinline__ SweepChunk(float* memory, int steps, int group) {
    const int count = steps * group;
    x = memory;
    x0 = x + count;
    slope = x0 + count;
    noise = slope + count;
    log_std = noise + count;
    mean_x0 = log_std + count;
    mean_x = mean_x0 + steps;
  }
};

// Of one step and channel of a token whose network has been called; leaves x and x0 where the next sweep looks for
// them. Where x0 is limited its slope is 0.
__device__ __forceinline__ StepOfSweep step_of_sweep(const Sweep& sweep, const StepTable& table, std::int64_t token,
                                                     std::int64_t at, const Limits& limits, bool first) {
  StepOfSweep step;
  const float x = step.x = sweep.x[at], x_before = first ? 0.0f : sweep.before[at];
  float after[2] = {};  // x0 and its slope in the group after this one
#pragma unroll 1
  for (int g = sweep.groups - 1; g >= 0; --g) {  // as in guided_output
    const std::int64_t of_group = g * sweep.steps * sweep.tokens * sweep.channels + at;
    const float x0 = table.x0_x * x + table.x0_out * sweep.out[of_group];
    const float slope = first ? 0.0f : slope_of(x0, sweep.x0[of_group], x, x_before);
    sweep.x0[of_group] = x0;
    if (g == sweep.groups - 1) {
      step.x0 = x0;
      step.slope = slope;
    } else {
      const float scale = sweep.scale[g * sweep.tokens + token];
      step.x0 += scale * (x0 - after[0]);
      step.slope += scale * (slope - after[1]);
    }
    after[0] = x0;
    after[1] = slope;
  }
  sweep.before[at] = x;
  if (limits.beyond(step.x0)) step.slope = 0.0f;
  step.x0 = limits.of(step.x0);
  step.log_std = log_std_of(sweep.v ? sweep.v[at] : 0.0f, table, sweep.v != nullptr);
  return step;
}

// A block has one token and up to kSweepChannels of its channels. Chunk after chunk from the noise end on, all of its
// threads find out what they can of every step by itself, and then one thread a channel runs the recursion.
__global__ void __launch_bounds__(kSweepThreads) sweep_kernel(Sweep sweep) {
  const int channels = sweep.channels, groups = (channels + kSweepChannels - 1) / kSweepChannels;
  const std::int64_t token = blockIdx.x / groups;
  const int first_channel = static_cast<int>(blockIdx.x % groups) * kSweepChannels;
  const int group = channels - first_channel < kSweepChannels ? channels - first_channel : kSweepChannels;
  const int quads = (group + kQuad - 1) / kQuad, most = sweep.steps < kSweepSteps ? sweep.steps : kSweepSteps;
  const SweepChunk chunk(shared_memory<float>(), most, group);
  wait_for_earlier();
  if (!sweep.begin && (idle(sweep.live) || sweep.settled[token])) return;
  const bool first = sweep.begin || *sweep.done == 0, guessed = sweep.begin && sweep.guessed;
  const float temperature = *sweep.temperature;
  // The state of the recursion, of the threads that run it.
  const bool runs = static_cast<int>(threadIdx.x) < group;
  const std::int64_t own = token * channels + first_channel + static_cast<int>(threadIdx.x);
  const std::int64_t step_stride = sweep.tokens * channels;
  float y = runs ? sweep.start[own] : 0.0f, mean = 0.0f, log_std = 0.0f, path = 0.0f, change = 0.0f, size = 0.0f;
  for (int stop = sweep.steps; stop > 0; stop -= kSweepSteps) {
    const int start = stop > kSweepSteps ? stop - kSweepSteps : 0, steps = stop - start;
    for (int i = static_cast<int>(threadIdx.x); i < steps * quads; i += kSweepThreads) {
      const int of_chunk = i / quads, step = start + of_chunk, from = i % quads * kQuad;
      const StepTable table = sweep.tables[step];
      if (from == 0) {
        chunk.mean_x0[of_chunk] = table.mean_x0;
        chunk.mean_x[of_chunk] = table.mean_x;
      }
      const std::int64_t of_token = token * channels + first_channel + from;
      Normals normals = {};
      if (step > 0 && !sweep.noise.noise) {
        normals = normals_at(static_cast<std::uint64_t>(*sweep.noise.seed), sweep.noise.addresses[token], step,
                             (first_channel + from) / kQuad, kStreamStep);
      }
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (from + k >= group) continue;
        const Limits limits(sweep.clip, first_channel + from + k, channels);
        StepOfSweep values = {0.0f, 0.0f, 0.0f, 0.0f, table.log_std_lower};
        if (!sweep.begin) {
          values = step_of_sweep(sweep, table, token, step * step_stride + of_token + k, limits, first);
        }
        if (step > 0) {
          if (sweep.noise.noise) normals.v[k] = sweep.noise.noise[step * sweep.noise.stride + of_token + k];
          values.noise = scaled_noise(normals.v[k], temperature, values.log_std);
        }
        const int at = of_chunk * group + from + k;
        chunk.x[at] = values.x;
        chunk.x0[at] = values.x0;
        chunk.slope[at] = values.slope;
        chunk.noise[at] = values.noise;
        chunk.log_std[at] = values.log_std;
      }
    }
    sync_block();
    if (runs) {
#pragma unroll 8
      for (int of_chunk = steps - 1; of_chunk >= 0; --of_chunk) {
        const int at = of_chunk * group + static_cast<int>(threadIdx.x), step = start + of_chunk;
        const float moved = y - chunk.x[at];
        if (!guessed || step == sweep.steps - 1) sweep.x[step * step_stride + own] = y;
        change = larger(change, fabsf(moved));
        size = larger(size, fabsf(y));
        mean = chunk.mean_x0[of_chunk] * (chunk.x0[at] + chunk.slope[at] * moved) + chunk.mean_x[of_chunk] * y;
        log_std = chunk.log_std[at];
        if (step > 0) path += log_std;
        y = mean + chunk.noise[at];
      }
    }
    sync_block();  // the next chunk takes this one's memory
  }
  if (!runs) return;
  if (sweep.begin) {
    sweep.mean[own] = guessed ? INFINITY : mean;  // for the first sweep's change, which settles nothing
    return;
  }
  sweep.change[own] = larger(change, fabsf(mean - sweep.mean[own]));
  sweep.size[own] = larger(size, fabsf(mean));
  sweep.mean[own] = mean;
  sweep.log_std[own] = log_std;
  sweep.path[own] = path;
}

// One block: a thread has a token, and tokens kSettleThreads further.
__global__ void __launch_bounds__(kSettleThreads) settle_kernel(Settle settle) {
  auto* votes = shared_memory<std::int32_t>();  // [kSettleThreads / kWarp]
  wait_for_earlier();
  const int count = *settle.count, sweeps = settle.begin ? 0 : *settle.done + 1;
  if (!settle.begin && idle(settle.live)) return;
  const float tolerance = *settle.tolerance;
  bool left = false;
  for (std::int64_t token = threadIdx.x; token < settle.tokens; token += kSettleThreads) {
    bool settled = token >= count;
    if (!settle.begin) {
      if (settle.settled[token]) continue;
      float change = 0.0f, size = 0.0f;
      for (int c = 0; c < settle.channels; ++c) {
        change = larger(change, settle.change[token * settle.channels + c]);
        size = larger(size, settle.size[token * settle.channels + c]);
      }
      // A first sweep has none to compare with. After T sweeps every step was computed from the input that it has.
      const bool near = sweeps > 1 && change <= tolerance * size, exact = sweeps >= settle.steps;
      settled = (near || exact) && size <= FLT_MAX;
    }
    settle.settled[token] = settled;
    settle.sweeps[token] = sweeps;
    left = left || !settled;
  }
  const unsigned of_warp = ballot(left);
  if (lane() == 0) votes[warp()] = of_warp != 0;
  sync_block();  // also: all have read what is written now
  if (threadIdx.x > 0) return;
  int any = 0;
  for (int i = 0; i < kSettleThreads / kWarp; ++i) any |= votes[i];
  *settle.done = sweeps;
  *settle.left = any;
  *settle.live = any && sweeps < settle.limit;
}

}  // namespace cspd
