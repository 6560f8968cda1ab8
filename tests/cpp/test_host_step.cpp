// One reverse step of a channel against long double, and where its noise comes from.
#include "check.h"
#include "cspd/step.cuh"
#include "random.h"

namespace {

constexpr long double kEpsilon = 0x1p-23L;

long double limited(long double x0, const cspd::Limits& limits) {
  return std::fmin(std::fmax(x0, limits.low), limits.high);
}

// One to three groups, with and without limits, of a variance that is learned or not.
void steps() {
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const auto number = [&random](double scale) { return static_cast<float>(scale * random.normal()); };
    const cspd::StepTable table = {number(5), number(5), number(1), number(1), number(2), number(2), {}};
    const cspd::Output out = {{number(2), number(2), number(2)}, number(1)};
    const float x = number(2), scales[] = {number(4), number(3)}, noise = number(1);
    const auto temperature = static_cast<float>(random.uniform(0, 1.5));
    const int groups = i % 3 + 1;
    const bool last = i & 2, learned = i & 4;
    const float ends[] = {-1.0f - std::fabs(number(1)), 1.0f}, none[] = {-INFINITY, INFINITY};
    const cspd::Limits limits(i & 8 ? ends : none, 0, 1);
    const float guided = cspd::guided_output(out, groups, scales);
    const auto got = cspd::reverse_step(x, guided, out.v, table, learned, limits, temperature, noise, last);

    long double mixed = out.of[groups - 1], mixed_size = std::fabs(mixed);
    for (int g = 0; g + 1 < groups; ++g) {
      mixed += static_cast<long double>(scales[g]) * (static_cast<long double>(out.of[g]) - out.of[g + 1]);
      mixed_size += std::fabs(scales[g]) * (std::fabs(out.of[g]) + std::fabs(out.of[g + 1]));
    }
    CHECK_NEAR_SCALE(guided, mixed, 4 * kEpsilon, mixed_size);
    const long double x0 = limited(static_cast<long double>(table.x0_x) * x + table.x0_out * mixed, limits);
    const long double mean = table.mean_x0 * x0 + static_cast<long double>(table.mean_x) * x;
    const long double size =
        std::fabs(table.mean_x0) * (std::fabs(table.x0_x * x) + std::fabs(table.x0_out) * mixed_size) +
        std::fabs(table.mean_x * x);
    const long double f = (static_cast<long double>(out.v) + 1) / 2;
    const long double log_std = learned ? f * table.log_std_upper + (1 - f) * table.log_std_lower : table.log_std_lower;
    const long double log_size = (1 + std::fabs(f)) * (std::fabs(table.log_std_upper) + std::fabs(table.log_std_lower));
    const long double move = last ? 0.0L : temperature * std::exp(log_std) * noise;
    CHECK_NEAR_SCALE(got.log_std, log_std, 4 * kEpsilon, log_size);
    CHECK_NEAR_SCALE(got.x, mean + move, 4 * kEpsilon, size + std::fabs(move) * (2 + log_size));
  }
}

// v = 1 is the upper bound and v = -1 the lower one; the last step has no noise, nor has temperature 0, nor a step of
// log standard deviation -inf, whatever lies where its noise would be.
void ends() {
  const cspd::StepTable table = {1.5f, -0.5f, 0.25f, 0.75f, -1.0f, -3.0f, {}};
  const auto step = [](const cspd::StepTable& table, float v, bool learned, float temperature, float noise, bool last) {
    return cspd::reverse_step(1, 0, v, table, learned, {}, temperature, noise, last);
  };
  CHECK_EQUAL(step(table, 1, true, 1, 0, false).log_std, -1.0f);
  CHECK_EQUAL(step(table, -1, true, 1, 0, false).log_std, -3.0f);
  CHECK_EQUAL(step(table, 1, false, 1, 0, false).log_std, -3.0f);
  const float mean = 0.25f * 1.5f + 0.75f;
  CHECK_EQUAL(step(table, 0, true, 1, 9, true).x, mean);
  CHECK_EQUAL(step(table, 0, true, 0, 9, false).x, mean);
  CHECK(step(table, 0, true, 1, 9, false).x > mean);
  const cspd::StepTable silent = {1.5f, -0.5f, 0.25f, 0.75f, -INFINITY, -INFINITY, {}};
  for (const float noise : {9.0f, -INFINITY, NAN}) {
    CHECK_EQUAL(step(silent, 0, false, 1, noise, false).x, mean);
    CHECK_EQUAL(step(silent, 0, false, 1, noise, false).log_std, -INFINITY);
  }
  // Without guidance neither the scales nor the other groups are read.
  CHECK_EQUAL(cspd::guided_output({{2, NAN, NAN}, 0}, 1, {NAN, NAN}), 2.0f);
  CHECK_EQUAL(cspd::guided_output({{2, 1, NAN}, 0}, 2, {3, NAN}), 4.0f);
}

void limits() {
  const float clip[] = {-1, -2, -3, 1, 2, 3};
  for (int channel = 0; channel < 3; ++channel) {
    const cspd::Limits limits(clip, channel, 3);
    const auto end = static_cast<float>(channel + 1);
    for (const float x0 : {-9.0f, -INFINITY}) CHECK(limits.beyond(x0) && limits.of(x0) == -end);
    for (const float x0 : {9.0f, INFINITY}) CHECK(limits.beyond(x0) && limits.of(x0) == end);
    for (const float x0 : {-end, 0.5f, end}) CHECK(!limits.beyond(x0) && limits.of(x0) == x0);
    CHECK(std::isnan(limits.of(NAN)));
  }
  const cspd::Limits none(nullptr, 0, 3);
  for (const float x0 : {-INFINITY, -9.0f, INFINITY}) CHECK(!none.beyond(x0) && none.of(x0) == x0);
  CHECK(std::isnan(none.of(NAN)));
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
  limits();
  noise();
  return check::finish("step");
}
