// One reverse step of a channel against long double, and where its noise comes from.
#include "check.h"
#include "cspd/posterior.cuh"
#include "random.h"

namespace {

constexpr long double kEpsilon = 0x1p-23L;

void steps() {
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const auto number = [&random](double scale) { return static_cast<float>(scale * random.normal()); };
    const cspd::StepTable table = {number(5), number(5), number(1), number(1), number(2), number(2), {}};
    const cspd::Output out = {number(2), number(1), number(2)};
    const float x = number(2), scale = number(4), noise = number(1);
    const auto temperature = static_cast<float>(random.uniform(0, 1.5));
    const bool guided = i & 1, last = i & 2;
    const auto got = cspd::reverse_step(x, out, table, guided, scale, temperature, noise, last);

    const long double s = scale;
    const long double eps = guided ? out.eps_u + s * (static_cast<long double>(out.eps) - out.eps_u) : out.eps;
    const long double eps_size =
        guided ? std::fabs(out.eps_u) + std::fabs(s) * (std::fabs(out.eps) + std::fabs(out.eps_u)) : std::fabs(out.eps);
    const long double x0 = static_cast<long double>(table.sqrt_recip_acp) * x - table.sqrt_recipm1_acp * eps;
    const long double mean = table.coef1 * x0 + static_cast<long double>(table.coef2) * x;
    const long double size =
        std::fabs(table.coef1) * (std::fabs(table.sqrt_recip_acp * x) + std::fabs(table.sqrt_recipm1_acp) * eps_size) +
        std::fabs(table.coef2 * x);
    const long double f = (static_cast<long double>(out.v) + 1) / 2;
    const long double log_std = f * table.log_std_upper + (1 - f) * table.log_std_lower;
    const long double log_size = (1 + std::fabs(f)) * (std::fabs(table.log_std_upper) + std::fabs(table.log_std_lower));
    const long double move = last ? 0.0L : temperature * std::exp(log_std) * noise;
    CHECK_NEAR_SCALE(got.log_std, log_std, 4 * kEpsilon, log_size);
    CHECK_NEAR_SCALE(got.x, mean + move, 4 * kEpsilon, size + std::fabs(move) * (2 + log_size));
  }
}

// v = 1 is the upper bound and v = -1 the lower one; the last step has no noise, nor has temperature 0.
void ends() {
  const cspd::StepTable table = {1.5f, 0.5f, 0.25f, 0.75f, -1.0f, -3.0f, {}};
  CHECK_EQUAL(cspd::reverse_step(1, {0, 1, 0}, table, false, 1, 1, 0, false).log_std, -1.0f);
  CHECK_EQUAL(cspd::reverse_step(1, {0, -1, 0}, table, false, 1, 1, 0, false).log_std, -3.0f);
  const float mean = 0.25f * 1.5f + 0.75f;
  CHECK_EQUAL(cspd::reverse_step(1, {0, 0, 0}, table, false, 1, 1, 9, true).x, mean);
  CHECK_EQUAL(cspd::reverse_step(1, {0, 0, 0}, table, false, 1, 0, 9, false).x, mean);
  CHECK(cspd::reverse_step(1, {0, 0, 0}, table, false, 1, 1, 9, false).x > mean);
  // Without guidance neither the scale nor the unconditional half is read.
  CHECK_EQUAL(cspd::reverse_step(1, {0, 0, NAN}, table, false, NAN, 1, 9, true).x, mean);
}

void noise() {
  constexpr int kTokens = 3, kChannels = 5, kSteps = 4, kStride = 20;
  std::vector<float> stored(kStride * kSteps);
  for (std::size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<float>(i);
  const std::int64_t seed = -12345, addresses[kTokens] = {7, std::int64_t{1} << 40, -1};
  for (int step = 0; step < kSteps; ++step) {
    for (int token = 0; token < kTokens; ++token) {
      for (int channel = 0; channel < kChannels; ++channel) {
        CHECK_EQUAL(cspd::noise_at({stored.data(), kStride, nullptr, nullptr}, step, token, channel, kChannels),
                    static_cast<float>(step * kStride + token * kChannels + channel));
        CHECK_EQUAL(cspd::noise_at({nullptr, 0, &seed, addresses}, step, token, channel, kChannels),
                    cspd::normal_at(static_cast<std::uint64_t>(-12345), addresses[token],
                                    static_cast<std::uint32_t>(step), channel, cspd::kStreamStep));
      }
    }
  }
}

}  // namespace

int main() {
  steps();
  ends();
  noise();
  return check::finish("posterior");
}
