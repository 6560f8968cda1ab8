// The log density ratio and the normal distribution's tails, against long double.
#include "check.h"
#include "cspd/gaussian.cuh"
#include "random.h"

namespace {

constexpr long double kEpsilon = 0x1p-23L;
const long double kRootOfTwoPi = std::sqrt(2.0L * acosl(-1.0L));

// One term by its plain formula, and what float32 may be off by: a few roundings of the models' difference times the
// distance, not of the two exponents, which are far larger where close models lie far from x.
struct Term {
  long double value, error;
};

Term plain_term(float x, const cspd::Gaussians& g, float relaxation) {
  const long double sigma_p = std::exp(static_cast<long double>(g.log_p));
  const long double sigma_q = std::exp(static_cast<long double>(g.log_q));
  const long double a = (static_cast<long double>(x) - g.mean_p) / sigma_p;
  const long double b = (static_cast<long double>(x) - g.mean_q) / sigma_q;
  const long double log_scale = static_cast<long double>(g.log_p) - g.log_q, square = relaxation * relaxation;
  const long double apart = std::fabs((static_cast<long double>(g.mean_p) - g.mean_q) / sigma_q);
  const bool close = std::fabs(log_scale) < 0.5L;
  const long double difference = close ? apart + std::fabs(a * std::expm1(log_scale)) : std::fabs(a) + std::fabs(b);
  const long double size = difference * (std::fabs(a) + std::fabs(b)) / square + std::fabs(log_scale);
  return {0.5L * (b * b - a * a) / square - log_scale, 8 * kEpsilon * size};
}

void check_term(float x, const cspd::Gaussians& g, float relaxation) {
  const auto expected = plain_term(x, g, relaxation);
  CHECK_NEAR_SCALE(cspd::log_ratio_term(x, g, relaxation), expected.value, 1, expected.error);
}

void ratios() {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const auto relaxation = static_cast<float>(i % 3 == 0 ? 1.0 : i % 3 == 1 ? 42.0 : 0.3);
    const double log_q = random.uniform(std::log(1e-6), std::log(1e3));
    // Far apart, close, nearly equal scales.
    const double log_p = log_q + random.normal() * std::pow(10.0, random.integer(-5, 0));
    const double mean_q = random.normal(), sigma = std::exp(log_q);
    const double mean_p = mean_q + sigma * random.normal() * std::pow(10.0, random.integer(-5, 1));
    // Of the model, or far from both.
    const double x = mean_q + sigma * random.normal() * std::pow(10.0, random.integer(0, 4));
    check_term(
        static_cast<float>(x),
        {static_cast<float>(mean_q), static_cast<float>(log_q), static_cast<float>(mean_p), static_cast<float>(log_p)},
        relaxation);
  }
}

void ratios_of_equal_models() {
  Random random(2);
  for (int i = 0; i < 1000; ++i) {
    const auto mean = static_cast<float>(random.normal()), log_std = static_cast<float>(random.uniform(-14, 7));
    CHECK_EQUAL(cspd::log_ratio_term(static_cast<float>(100.0 * random.normal()), {mean, log_std, mean, log_std}, 1.0f),
                0.0f);
  }
  // At a scale whose inverse is infinite.
  CHECK_EQUAL(cspd::log_ratio_term(2.0f, {2.0f, -200.0f, 2.0f, -200.0f}, 1.0f), 0.0f);
  // Scales so far apart that their ratio is infinite, at the mean of both.
  CHECK_EQUAL(cspd::log_ratio_term(0.0f, {0.0f, -30.0f, 0.0f, 60.0f}, 1.0f), -90.0f);
  CHECK_EQUAL(cspd::inverse_std(-200.0f), FLT_MAX);
  CHECK_NEAR(cspd::inverse_std(1.5f), std::exp(-1.5), 2e-7);
}

// Also where two of them would cancel.
void what_is_not_finite_is_never_accepted() {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (int mask = 1; mask < 32; ++mask) {
      float values[] = {0.5f, 0.25f, -0.5f, 0.75f, -0.25f};
      for (int i = 0; i < 5; ++i) values[i] = mask >> i & 1 ? bad : values[i];
      const float term = cspd::log_ratio_term(values[0], {values[1], values[2], values[3], values[4]}, 1.0f);
      CHECK(std::isnan(term)) && CHECK_EQUAL(cspd::judged(term + 3.0f), -INFINITY);
    }
    for (const bool released : {false, true}) {
      CHECK(std::isnan(cspd::path_term(bad, 1.0f, released)));
      CHECK(std::isnan(cspd::path_term(1.0f, bad, released)));
      CHECK(std::isnan(cspd::path_term(bad, bad, released)));
    }
  }
  CHECK(std::isnan(cspd::log_ratio_term(0.5f, {0.25f, 0.0f, 0.5f, 0.0f}, NAN)));
  CHECK_EQUAL(cspd::path_term(3.0f, 1.25f, false), 1.75f);
  CHECK_EQUAL(cspd::path_term(3.0f, 1.25f, true), -1.75f);
  CHECK_EQUAL(cspd::judged(-7.5f), -7.5f);
  CHECK_EQUAL(cspd::judged(INFINITY), INFINITY);
}

// Q(t) / phi(t), from erfcl as far as it goes and from its asymptotic series beyond.
long double plain_mills(long double t) {
  if (t < 60) return std::sqrt(acosl(-1.0L) / 2) * std::exp(t * t / 2) * std::erfc(t / std::sqrt(2.0L));
  long double sum = 0.0L, term = 1.0L;
  for (int k = 1; k <= 12; ++k) {
    sum += term;
    term *= -(2 * k - 1) / (t * t);
  }
  return sum / t;
}

long double plain_tail(long double t) { return 0.5L * std::erfc(t / std::sqrt(2.0L)); }

void mills_ratios() {
  CHECK_NEAR(plain_mills(59.999999999L), plain_mills(60.0L), 1e-10L);
  for (double t = 0.0; t < 120.0; t += 0.003) CHECK_NEAR(cspd::mills_ratio(t), plain_mills(t), 2e-14L);
  for (double t = 120.0; t < 1e8; t *= 1.1) CHECK_NEAR(cspd::mills_ratio(t), plain_mills(t), 2e-14L);
}

void tails() {
  for (const double weight : {0.0, 3.0, -20.0}) {
    for (double t = -12.0; t < 36.0; t += 0.01) {
      CHECK_NEAR(cspd::weighted_tail(t, weight), std::exp(static_cast<long double>(weight)) * plain_tail(t), 1e-12L);
    }
  }
  // A weight beyond what exp can hold, times a tail below it.
  for (const double t : {2006.0, 2006.2}) {
    const double weight = 2e3 * (6 + 1e3);
    const long double exponent = static_cast<long double>(weight) - 0.5L * t * t;
    CHECK_NEAR(cspd::weighted_tail(t, weight), std::exp(exponent) * plain_mills(t) / kRootOfTwoPi, 1e-8L);
  }
}

void survivals() {
  for (const double distance : {1e-6, 1e-3, 0.5, 3.0, 40.0, 1e6}) {
    for (const double t_0 : {-1e6, -7.0, -6.0, -3.0, 0.0, 0.7, 4.0, 6.0}) {
      const cspd::Residual residual(distance, t_0);
      const double low = std::fmax(t_0, -cspd::kFarthest);
      for (double t = low; t <= low + 6.0; t += 0.05) {
        const long double from = t, other = from + distance;
        // The weight times phi(t + D) in one exponent, where the large squares are gone.
        const long double density = std::exp(distance * (t_0 - from) - 0.5L * from * from) / kRootOfTwoPi;
        const long double weight = std::exp(distance * (t_0 + 0.5L * distance));
        const long double second = other >= 0 ? density * plain_mills(other) : weight * plain_tail(other);
        // What is subtracted is off by the rounding of its exponent, D (t_0 + D / 2) - (t + D)^2 / 2.
        const long double terms = std::fabs(distance * t_0) + 0.5L * distance * distance + other * other;
        CHECK_NEAR_SCALE(residual.survival(t), plain_tail(from) - second, 1,
                         1e-13L * plain_tail(from) + 1e-15L * (1 + terms) * second);
      }
    }
  }
}

// The integral over t of (e^path phi(t) - c phi(t + D))_+, by Simpson's rule beyond the place where it begins.
long double plain_mass(long double c, long double distance, long double path) {
  const auto excess = [&](long double t) {
    const long double p = std::exp(path - 0.5L * t * t), q = c * std::exp(-0.5L * (t + distance) * (t + distance));
    return (p - q) / kRootOfTwoPi;
  };
  const long double start = std::fmax((std::log(c) - path) / distance - 0.5L * distance, -40.0L);
  constexpr int kSteps = 40000;
  const long double step = (std::fmax(start, 0.0L) + 40.0L - start) / kSteps;
  long double sum = 0.0L;
  for (int i = 0; i <= kSteps; ++i) sum += (i == 0 || i == kSteps ? 1 : i % 2 ? 4 : 2) * excess(start + i * step);
  return sum * step / 3;
}

void masses() {
  for (const double distance : {1e-3, 0.1, 1.0, 2.5, 8.0}) {
    for (const double path : {0.0, 0.7, -1.5, 4.0}) {
      for (const double c : {1.0, 1.3, 2.0, 30.0}) {
        const long double expected = plain_mass(c, distance, path);
        if (expected < 1e-300L) continue;
        // Closer models leave a smaller difference of the tails.
        const double got = cspd::log_mass_above(std::log(c), distance, path);
        CHECK_NEAR_SCALE(got, std::log(expected), 1, 1e-10L / std::fmin(distance, 1.0) + 1e-13L / expected);
      }
    }
  }
  // Equal Gaussians: what the path term leaves, or nothing.
  CHECK_NEAR(cspd::log_mass_above(0.0, 0.0, 3.0), std::log(std::exp(3.0) - 1.0), 1e-9);
  CHECK(cspd::log_mass_above(0.0, 0.0, -3.0) < -1e6);
  CHECK_NEAR(cspd::log_mass_above(0.0, 2.0, 0.0), std::log(std::erf(std::sqrt(0.5L))), 1e-12L);  // 2 Phi(1) - 1
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    CHECK_EQUAL(cspd::log_mass_above(0.0, bad, 0.0), -INFINITY);
  }
  CHECK_EQUAL(cspd::log_mass_above(0.0, 1.0, NAN), -INFINITY);
}

void accept_tests_of_later_candidates() {
  Random random(3);
  for (int i = 0; i < 20000; ++i) {
    const double log_ratio = 2.0 * random.normal(), log_c = std::fabs(random.normal()), log_mass = random.normal();
    const double u = random.uniform(1e-6, 1.0);
    const long double kept = std::exp(static_cast<long double>(log_ratio)) - std::exp(static_cast<long double>(log_c));
    const long double asked = u * std::exp(static_cast<long double>(log_mass));
    if (std::fabs(kept - asked) < 1e-12L * (std::fabs(kept) + asked)) continue;
    CHECK_EQUAL(cspd::passes(u, log_ratio, log_c, log_mass), asked <= kept);
    const long double sum = std::exp(static_cast<long double>(log_c)) + std::exp(static_cast<long double>(log_mass));
    CHECK_NEAR_SCALE(cspd::log_sum(log_c, log_mass), std::log(sum), 1e-14L, 1 + std::fabs(std::log(sum)));
  }
  // Where nothing is left but r > c, and where a sum would overflow.
  CHECK(cspd::passes(1.0, 1e-6, 0.0, -INFINITY));
  CHECK(!cspd::passes(1e-9, 0.5, 0.5, -INFINITY));
  CHECK(!cspd::passes(1e-9, -INFINITY, 0.5, -INFINITY));
  CHECK(cspd::passes(1.0, INFINITY, 0.5, 800.0));
  CHECK_EQUAL(cspd::log_sum(2.0, -INFINITY), 2.0);
  CHECK_EQUAL(cspd::log_sum(2.0, 5000.0), 5000.0);
}

}  // namespace

int main() {
  ratios();
  ratios_of_equal_models();
  what_is_not_finite_is_never_accepted();
  mills_ratios();
  tails();
  survivals();
  masses();
  accept_tests_of_later_candidates();
  return check::finish("gaussian");
}
