// One reverse step of a channel, as cspd_kernels/ops/denoise/reference.py defines it.
#pragma once

#include "cspd/parameters.h"
#include "cspd/philox.cuh"

namespace cspd {

// What the network puts out for one channel: eps and v of the conditional row, eps of the unconditional one.
struct Output {
  float eps, v, eps_u;
};

struct Step {
  float x, log_std;  // after the step; without the temperature
};

CSPD_HD Step reverse_step(float x, const Output& out, const StepTable& table, bool guided, float scale,
                          float temperature, float noise, bool last) {
  const float eps = guided ? out.eps_u + scale * (out.eps - out.eps_u) : out.eps;
  const float x0 = table.sqrt_recip_acp * x - table.sqrt_recipm1_acp * eps;
  const float mean = table.coef1 * x0 + table.coef2 * x;
  const float f = (out.v + 1.0f) * 0.5f;
  const float log_std = f * table.log_std_upper + (1.0f - f) * table.log_std_lower;
  return {last ? mean : mean + temperature * expf(log_std) * noise, log_std};
}

CSPD_HD float noise_at(const Noise& noise, int step, std::int64_t token, int channel, int channels) {
  if (noise.noise) return noise.noise[step * noise.stride + token * channels + channel];
  return normal_at(static_cast<std::uint64_t>(*noise.seed), noise.addresses[token], step, channel, kStreamStep);
}

}  // namespace cspd
