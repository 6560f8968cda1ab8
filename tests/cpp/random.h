// Random inputs of tests, the same everywhere, and tests of what is random itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

constexpr double kPi = 3.141592653589793;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t bits() { return engine_(); }
  double uniform(double low, double high) { return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53); }
  int integer(int low, int high) { return low + static_cast<int>(bits() % static_cast<std::uint64_t>(high - low + 1)); }
  double normal() { return std::sqrt(-2.0 * std::log(1.0 - uniform(0, 1))) * std::cos(2.0 * kPi * uniform(0, 1)); }

  std::vector<float> normals(std::size_t count, double scale = 1.0, double mean = 0.0) {
    std::vector<float> values(count);
    for (auto& value : values) value = static_cast<float>(mean + scale * normal());
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

inline double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

// Kolmogorov-Smirnov: how probable it is that a sample of this distribution lies as far from it.
template <typename Cdf>
double ks_p_value(std::vector<double> sample, const Cdf& cdf) {
  std::sort(sample.begin(), sample.end());
  const auto count = static_cast<double>(sample.size());
  double distance = 0.0;
  for (std::size_t i = 0; i < sample.size(); ++i) {
    const double at = cdf(sample[i]), below = static_cast<double>(i) / count;
    distance = std::fmax(distance, std::fmax(at - below, below + 1.0 / count - at));
  }
  const double root = std::sqrt(count), lambda = (root + 0.12 + 0.11 / root) * distance;
  if (!(lambda > 0.2)) return lambda <= 0.2 ? 1.0 : 0.0;  // the series does not converge; NaN is no sample of anything
  double p = 0.0;
  for (int k = 1; k <= 100; ++k) p += (k % 2 ? 2.0 : -2.0) * std::exp(-2.0 * k * k * lambda * lambda);
  return p;
}
