// The end of a sweep over all steps of a chain at once, as cspd_kernels/ops/denoise/reference.py defines it: the
// recursion from step to step with x0 of every step linear around the inputs of the sweep, and which tokens have settled.
//
// A block has one token and up to 16 channels of it. Steps go through it in chunks, the noise end first: what does not
// depend on the recursion is computed for all steps of a chunk at once and left in shared memory, one thread a channel
// runs the recursion from there, and all threads store what has come of it.
#pragma once

#include "cspd/device.cuh"
#include "cspd/posterior.cuh"

namespace cspd {

constexpr int kSweepThreads = 128;
constexpr int kSweepChannels = 16;  // of a block; each thread has one of them
constexpr int kSweepSteps = 64;     // of a chunk
constexpr int kSettleThreads = 256;

// The secant of x0 through two sweeps, limited to [0, 1]; 0 in the first, where x has not moved, and for NaN.
__device__ __forceinline__ float slope_of(float change, float moved, bool first) {
  const float secant = change / moved;
  return !first && secant > 0.0f ? (secant < 1.0f ? secant : 1.0f) : 0.0f;
}

// The larger magnitude; infinite if the value is NaN.
__device__ __forceinline__ float largest_of(float largest, float value) {
  const float magnitude = fabsf(value);
  return magnitude <= largest ? largest : magnitude == magnitude ? magnitude : INFINITY;
}

struct SweepMemory {
  // [kSweepSteps, kSweepChannels] each: the inputs x, x0 there, its slope, and temperature exp(log std) noise; then the
  // inputs of the next sweep take the place of the slopes.
  float x[kSweepSteps * kSweepChannels], x0[kSweepSteps * kSweepChannels], slope[kSweepSteps * kSweepChannels],
      noise[kSweepSteps * kSweepChannels];
  float coef1[kSweepSteps], coef2[kSweepSteps];
  float mean[kSweepChannels];
  float sums[3][kSweepThreads];  // of path, change and size
};

__device__ __forceinline__ void sweep_chunk(const Sweep& sweep, SweepMemory& memory, std::int64_t token, int first_channel,
                                            int low, int count, bool first, float scale, float& now, float& path,
                                            float& change, float& size) {
  const int channels = sweep.channels, own = static_cast<int>(threadIdx.x) % kSweepChannels;
  const int channel = first_channel + own;
  const bool mine = channel < channels;
  const float temperature = *sweep.temperature;
  for (int j = static_cast<int>(threadIdx.x) / kSweepChannels; j < count; j += kSweepThreads / kSweepChannels) {
    if (!mine) continue;
    const int step = low + j, at = j * kSweepChannels + own;
    const std::int64_t of = (step * sweep.tokens + token) * channels + channel;
    const StepTable table = sweep.tables[step];
    float x = 0.0f, x0 = 0.0f, slope = 0.0f, log_std = table.log_std_lower;
    if (!sweep.begin) {
      x = sweep.x[of];
      const float moved = x - sweep.before[of];
      x0 = table.sqrt_recip_acp * x - table.sqrt_recipm1_acp * sweep.eps[of];
      slope = slope_of(x0 - sweep.x0[of], moved, first);
      sweep.before[of] = x;
      sweep.x0[of] = x0;
      if (sweep.eps_u) {
        const float x0_u = table.sqrt_recip_acp * x - table.sqrt_recipm1_acp * sweep.eps_u[of];
        const float slope_u = slope_of(x0_u - sweep.x0_u[of], moved, first);
        sweep.x0_u[of] = x0_u;
        x0 = x0_u + scale * (x0 - x0_u);
        slope = slope_u + scale * (slope - slope_u);
      }
      log_std = table.log_std_upper;
      if (sweep.v) {
        const float f = (sweep.v[of] + 1.0f) * 0.5f;
        log_std = f * table.log_std_upper + (1.0f - f) * table.log_std_lower;
      }
      if (step > 0) path += log_std;
      if (step == 0) sweep.log_std[token * channels + channel] = log_std;
    }
    memory.x[at] = x;
    memory.x0[at] = x0;
    memory.slope[at] = slope;
    memory.noise[at] =
        step > 0 ? temperature * expf(log_std) * noise_at(sweep.noise, step, token, channel, channels) : 0.0f;
    if (own == 0) {
      memory.coef1[j] = table.coef1;
      memory.coef2[j] = table.coef2;
    }
  }
  sync_block();
  if (threadIdx.x < kSweepChannels && mine) {
    for (int j = count - 1; j >= 0; --j) {
      const int at = j * kSweepChannels + own;
      const float x0 = memory.x0[at] + memory.slope[at] * (now - memory.x[at]);
      const float mean = memory.coef1[j] * x0 + memory.coef2[j] * now;
      memory.slope[at] = now;
      now = low + j > 0 ? mean + memory.noise[at] : mean;
    }
  }
  sync_block();
  for (int j = static_cast<int>(threadIdx.x) / kSweepChannels; j < count; j += kSweepThreads / kSweepChannels) {
    if (!mine) continue;
    const int at = j * kSweepChannels + own;
    const float next = memory.slope[at];
    sweep.x[((low + j) * sweep.tokens + token) * channels + channel] = next;
    change = largest_of(change, next - memory.x[at]);
    size = largest_of(size, next);
  }
  sync_block();  // before the next chunk overwrites it
}

// In place on x, before, x0 and x0_u. A token that has settled is left as it is.
__global__ void __launch_bounds__(kSweepThreads) sweep_kernel(Sweep sweep) {
  auto& memory = *shared_memory<SweepMemory>();
  const int channels = sweep.channels, groups = (channels + kSweepChannels - 1) / kSweepChannels;
  const std::int64_t token = blockIdx.x / groups;
  const int first_channel = static_cast<int>(blockIdx.x % groups) * kSweepChannels;
  const int own = static_cast<int>(threadIdx.x) % kSweepChannels, channel = first_channel + own;
  const bool mine = channel < channels;
  const std::int64_t at = token * channels + channel;
  wait_for_earlier();
  if (!sweep.begin && (*sweep.live == 0 || sweep.settled[token] != 0)) return;
  float now = threadIdx.x < kSweepChannels && mine ? sweep.start[at] : 0.0f;
  if (sweep.begin && sweep.guessed) {  // of a guess the first input alone is known better
    if (threadIdx.x < kSweepChannels && mine) sweep.x[(sweep.steps - 1) * sweep.tokens * channels + at] = now;
    return;
  }
  const bool first = !sweep.begin && *sweep.done == 0;
  const float scale = sweep.eps_u ? sweep.scale[token] : 1.0f;
  float path = 0.0f, change = 0.0f, size = 0.0f;
  for (int stop = sweep.steps; stop > 0; stop -= kSweepSteps) {
    const int low = stop > kSweepSteps ? stop - kSweepSteps : 0;
    sweep_chunk(sweep, memory, token, first_channel, low, stop - low, first, scale, now, path, change, size);
  }
  if (sweep.begin) return;
  if (threadIdx.x < kSweepChannels && mine) {  // now is the mean of the last step
    change = largest_of(change, now - sweep.mean[at]);
    size = largest_of(size, now);
    sweep.mean[at] = now;
  }
  memory.sums[0][threadIdx.x] = path;
  memory.sums[1][threadIdx.x] = change;
  memory.sums[2][threadIdx.x] = size;
  sync_block();
  if (threadIdx.x >= kSweepChannels || !mine) return;
  for (int i = own + kSweepChannels; i < kSweepThreads; i += kSweepChannels) {
    path += memory.sums[0][i];
    change = largest_of(change, memory.sums[1][i]);
    size = largest_of(size, memory.sums[2][i]);
  }
  sweep.path[at] = path;
  sweep.change[at] = change;
  sweep.size[at] = size;
}

// One block. With ``begin`` the tokens beyond the call's own have settled, and no others.
__global__ void __launch_bounds__(kSettleThreads) settle_kernel(Settle settle) {
  int* open = shared_memory<int>();  // of every thread
  wait_for_earlier();
  if (!settle.begin && *settle.live == 0) return;
  const int sweep = settle.begin ? 0 : *settle.done + 1;
  const float tolerance = *settle.tolerance;
  int left = 0;
  for (std::int64_t token = threadIdx.x; token < settle.tokens; token += kSettleThreads) {
    bool settled = settle.begin ? token >= *settle.count : settle.settled[token] != 0;
    if (settle.begin) {
      settle.sweeps[token] = 0;
    } else if (!settled) {
      float change = 0.0f, size = 0.0f;
      for (int c = 0; c < settle.channels; ++c) {
        change = largest_of(change, settle.change[token * settle.channels + c]);
        size = largest_of(size, settle.size[token * settle.channels + c]);
      }
      settled = size < INFINITY && ((sweep > 1 && change <= tolerance * size) || sweep >= settle.steps);
      settle.sweeps[token] = sweep;
    }
    settle.settled[token] = settled;
    left += !settled;
  }
  open[threadIdx.x] = left;
  sync_block();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kSettleThreads; ++i) left += open[i];
  *settle.done = sweep;
  *settle.left = left > 0;
  *settle.live = left > 0 && sweep < settle.limit;
}

}  // namespace cspd
