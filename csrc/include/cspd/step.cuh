// One reverse step of a channel, as cspd_kernels/ops/denoise/reference.py defines it.
#pragma once

#include "cspd/parameters.h"
#include "cspd/philox.cuh"

namespace cspd {

// What the network puts out for one channel: in every group what x0 is made of, in the first v, too.
struct Output {
  float of[kMostGroups], v;
};

// Under guidance: out of the last group, and from group to group to the first as much of the way as the scale says.
// ``scale`` is the token's in the first of ``stride`` tokens.
template <int Most = kMostGroups>
CSPD_HD float guided_output(const Output& out, int groups, const float (&scales)[kMostGroups - 1]) {
  if (Most == 3 && groups == 3) {
    const float two = out.of[2] + scales[1] * (out.of[1] - out.of[2]);
    return two + scales[0] * (out.of[0] - out.of[1]);
  }
  return groups == 2 ? out.of[1] + scales[0] * (out.of[0] - out.of[1]) : out.of[0];
}

// What x0 of a channel is limited to: nothing where there is no ``clip`` [2, C].
struct Limits {
  float low = -INFINITY, high = INFINITY;

  Limits() = default;
  CSPD_HD Limits(const float* clip, int channel, int channels) {
    if (!clip) return;
    low = clip[channel];
    high = clip[channels + channel];
  }
  CSPD_HD bool beyond(float x0) const { return x0 < low || x0 > high; }
  CSPD_HD float of(float x0) const { return x0 < low ? low : x0 > high ? high : x0; }  // NaN stays NaN
};

CSPD_HD float log_std_of(float v, const StepTable& table, bool learned) {
  const float f = (v + 1.0f) * 0.5f;
  return learned ? f * table.log_std_upper + (1.0f - f) * table.log_std_lower : table.log_std_lower;
}

// 0 of a step that adds none, whatever lies where its noise would be.
CSPD_HD float scaled_noise(float noise, float temperature, float log_std) {
  return log_std == -INFINITY ? 0.0f : temperature * expf(log_std) * noise;
}

struct Step {
  float x, log_std;  // after the step; without the temperature
};

CSPD_HD Step reverse_step(float x, float out, float v, const StepTable& table, bool learned, const Limits& limits,
                          float temperature, float noise, bool last) {
  const float x0 = limits.of(table.x0_x * x + table.x0_out * out);
  const float mean = table.mean_x0 * x0 + table.mean_x * x;
  const float log_std = log_std_of(v, table, learned);
  return {last ? mean : mean + scaled_noise(noise, temperature, log_std), log_std};
}

CSPD_HD float noise_at(const Noise& noise, int step, std::int64_t token, int channel, int channels) {
  if (noise.noise) return noise.noise[step * noise.stride + token * channels + channel];
  return normal_at(static_cast<std::uint64_t>(*noise.seed), noise.addresses[token], step, channel, kStreamStep);
}

}  // namespace cspd
