// Layers of the network in plain double loops, and operands of any type.
#pragma once

#include "cspd/launch.h"
#include "cspd/step.cuh"
#include "device.h"
#include "random.h"

using Doubles = std::vector<double>;

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr auto kOperand = cspd::Operand::kFloat32;
  static constexpr const char* kName = "float32";
  static constexpr double kRounding = 3e-6;  // of the largest value: a few roundings, or two of the type itself
};
template <>
struct Type<cspd::float16> {
  static constexpr auto kOperand = cspd::Operand::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr double kRounding = 0x1p-10;
};
template <>
struct Type<cspd::bfloat16> {
  static constexpr auto kOperand = cspd::Operand::kBfloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr double kRounding = 0x1p-7;
};

template <typename T>
std::vector<T> converted(const std::vector<float>& values) {
  std::vector<T> result;
  for (const float value : values) result.push_back(cspd::from_float<T>(value));
  return result;
}

template <typename T>
Doubles doubles(const std::vector<T>& values) {
  Doubles result;
  for (const T value : values) result.push_back(cspd::to_float(value));
  return result;
}

// A tensor on the device, and its values as they are there.
template <typename T>
struct Tensor {
  std::vector<T> typed;
  Doubles values;
  device::Array<T> array;

  explicit Tensor(const std::vector<float>& wanted)
      : typed(converted<T>(wanted)), values(doubles(typed)), array(typed) {}
  const T* get() const { return array.get(); }
};

// A launch that needs what kernels before it write into these tensors, see run_early.
template <typename Launch, typename... Tensors>
void run_early(const Launch& launch, const Tensors&... late) {
  (late.array.poison(), ...);
  device::run_early([&] { (late.array.set(late.typed), ...); }, launch);
}

inline double silu(double value) { return value / (1.0 + std::exp(-value)); }

template <typename T>
double rounded(double value) {
  return cspd::to_float(cspd::from_float<T>(static_cast<float>(value)));
}

// [rows, n] = x [rows, k] @ weight [n, k]^T + bias [n].
inline Doubles linear(const Doubles& x, const Doubles& weight, const Doubles& bias) {
  const std::size_t n = bias.size(), k = weight.size() / n, rows = x.size() / k;
  Doubles out(rows * n);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t column = 0; column < n; ++column) {
      double sum = bias[column];
      for (std::size_t i = 0; i < k; ++i) sum += x[row * k + i] * weight[column * k + i];
      out[row * n + column] = sum;
    }
  }
  return out;
}

// norm(h) (1 + scale) + shift of one row; ``mods`` points at the row's shift, which the scale follows. ``gain`` and
// ``offset`` are empty where the norm is not affine. With ``rms`` it is by the root of the mean square, else LayerNorm.
inline Doubles modulated(const double* h, int width, const Doubles& gain, const Doubles& offset, const double* mods,
                         double epsilon, bool rms = false) {
  double mean = 0.0, variance = 0.0;
  for (int i = 0; i < width && !rms; ++i) mean += h[i] / width;
  for (int i = 0; i < width; ++i) variance += (h[i] - mean) * (h[i] - mean) / width;
  Doubles out(width);
  for (int i = 0; i < width; ++i) {
    double normal = (h[i] - mean) / std::sqrt(variance + epsilon);
    if (!gain.empty()) normal = normal * gain[i] + offset[i];
    out[i] = normal * (1.0 + mods[width + i]) + mods[i];
  }
  return out;
}

// Of what the groups put out for one channel, the first one first: by one scale from each to the one before.
inline double plain_guided(const Doubles& groups, const Doubles& scales) {
  double out = groups.back();
  for (std::size_t g = 0; g + 1 < groups.size(); ++g) out += scales[g] * (groups[g] - groups[g + 1]);
  return out;
}

struct PlainLimits {
  double low = -INFINITY, high = INFINITY;
  double of(double x0) const { return std::min(std::max(x0, low), high); }
};

inline double plain_log_std(double v, const cspd::StepTable& table, bool learned) {
  const double f = (v + 1) / 2;
  return learned ? f * table.log_std_upper + (1 - f) * table.log_std_lower : table.log_std_lower;
}

// What a reverse step makes of one channel's output of the network.
struct PlainStep {
  double x, log_std;
};

inline PlainStep plain_step(double x, double out, double v, const cspd::StepTable& table, bool learned,
                            const PlainLimits& limits, double temperature, double noise, bool last) {
  const double x0 = limits.of(table.x0_x * x + table.x0_out * out);
  const double mean = table.mean_x0 * x0 + table.mean_x * x, log_std = plain_log_std(v, table, learned);
  return {last ? mean : mean + temperature * std::exp(log_std) * noise, log_std};
}

// Coefficients that keep x of order 1.
inline cspd::StepTable table_of(int step, bool deterministic = false) {
  const auto s = static_cast<float>(step);
  const float upper = deterministic ? -INFINITY : -1.0f - 0.1f * s,
              lower = deterministic ? -INFINITY : -2.0f - 0.2f * s;
  return {1.05f + 0.02f * s, -0.3f - 0.05f * s, 0.6f - 0.03f * s, 0.35f + 0.02f * s, upper, lower, {}};
}

// [2, C], of which some values of order 1 are beyond.
inline std::vector<float> clip_of(int channels) {
  std::vector<float> clip;
  for (int c = 0; c < channels; ++c) clip.push_back(-0.5f - 0.01f * static_cast<float>(c));
  for (int c = 0; c < channels; ++c) clip.push_back(0.4f + 0.02f * static_cast<float>(c));
  return clip;
}

inline PlainLimits limits_of(const std::vector<float>& clip, int channel) {
  if (clip.empty()) return {};
  return {clip[channel], clip[clip.size() / 2 + channel]};
}
