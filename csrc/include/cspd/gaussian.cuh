// The log density ratio of two Gaussians at one point, and tails of the normal distribution.
//
// p is the target, q the draft. cspd_kernels/ops/density_ratio/reference.py and accept_reject/reference.py define
// what is computed here, and docs/method.md derives it.
#pragma once

#include <cfloat>

#include "cspd/portable.cuh"

namespace cspd {

// One channel of the last step of both chains.
struct Gaussians {
  float mean_q, log_q, mean_p, log_p;
};

CSPD_HD float inverse_std(float log_std) { return fminf(expf(-log_std), FLT_MAX); }

// log N(x; mu_p, sigma_p) - log N(x; mu_q, sigma_q), squared residuals divided by relaxation^2.
//
// With a = (x - mu_p) / sigma_p and b = (x - mu_q) / sigma_q the exponents' difference is (b - a) (b + a) / 2. Where
// the scales are close, b - a is formed from the small differences of the models themselves, so that close models far
// from x do not cancel. NaN where an operand is not finite.
CSPD_HD float log_ratio_term(float x, const Gaussians& g, float relaxation) {
  const float log_scale = g.log_p - g.log_q, inverse_q = inverse_std(g.log_q);
  const float a = (x - g.mean_p) * inverse_std(g.log_p), b = (x - g.mean_q) * inverse_q;
  const float close = (g.mean_p - g.mean_q) * inverse_q + a * expm1f(log_scale);
  float difference = fabsf(log_scale) < 0.5f ? close : b - a, total = a + b;
  // Without relaxation nothing changes, and two divisions would take a fourth of the instructions.
  if (relaxation != 1.0f) {
    difference /= relaxation;
    total /= relaxation;
  }
  const float poison = 0.0f * x + 0.0f * g.mean_q + 0.0f * g.mean_p + 0.0f * g.log_q + 0.0f * g.log_p;
  return 0.5f * difference * total - log_scale + poison;
}

// L_q - L_p, or its negative as the released code has it; NaN where it is not finite.
CSPD_HD float path_term(float path_q, float path_p, bool released) {
  const float path = released ? path_p - path_q : path_q - path_p;
  return path + 0.0f * path;
}

// A row that cannot be judged, NaN, is never accepted.
CSPD_HD float judged(float log_ratio) { return log_ratio == log_ratio ? log_ratio : -INFINITY; }

// Q(t) / phi(t) for t >= 0, Q the normal's upper tail, to 1e-14: a polynomial fit of (t + 4) Q(t) / phi(t) in
// (t - 4) / (t + 4).
CSPD_HD double mills_ratio(double t) {
  const double coefficients[] = {1.694634851711294e-08,   3.246097788147439e-08,   -1.418963836663327e-07,
                                 -3.6980329543421077e-07, 5.886507245617645e-07,   2.5284643065651822e-06,
                                 -1.5037142571422076e-06, -1.4811589753109296e-05, 1.757374125438696e-06,
                                 8.80801678666937e-05,    -4.770094625462865e-06,  -0.0005792645450405851,
                                 0.0003342418261349448,   0.004087854811152283,    -0.008722294928179589,
                                 -0.018900450775092,      0.15139176229053172,     -0.46754096300217596,
                                 0.9704095548680988,      -1.5237709108199398,     1.8932190633084853};
  const double scale = 1.0 / (t + 4.0), w = (t - 4.0) * scale;
  double total = coefficients[0];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 1; i < 21; ++i) total = total * w + coefficients[i];
  return total * scale;
}

// exp(log_weight) Q(t); the weight may lie beyond what exp can hold.
CSPD_HD double weighted_tail(double t, double log_weight) {
  const double tail = 0.3989422804014327 * exp(log_weight - 0.5 * t * t) * mills_ratio(fabs(t));
  return t < 0 ? exp(log_weight) - tail : tail;
}

// The modified distribution along the models' difference D, in sigmas of the target: the survival function up to a
// factor, Q(t) - exp(D (t_0 + D / 2)) Q(t + D) for t >= t_0.
struct Residual {
  double distance, log_weight;

  CSPD_HD Residual(double distance, double t_0) : distance(distance), log_weight(distance * (t_0 + 0.5 * distance)) {}
  CSPD_HD double survival(double t) const { return weighted_tail(t, 0.0) - weighted_tail(t + distance, log_weight); }
};

constexpr double kFarthest = 6.0;   // a draw starts at most so many sigma beyond the target's mean
constexpr double kShortest = 1e-6;  // below this distance, in sigma, the shape no longer depends on it
constexpr int kPoints = 32;         // of one round of the search, one a thread
constexpr int kRounds = 6;          // 33^-6 of 18 sigma, 1e-8, is below float32's rounding

// Candidates after the first one, as cspd_kernels/ops/accept_reject/candidates.py defines them: what those before leave
// to be drawn is (e^path p - c q)_+, and ``mass`` is its integral.

// log mass at c, of models ``distance`` sigma apart. What is no number, or is less than nothing by rounding, is none.
CSPD_HD double log_mass_above(double log_c, double distance, double path) {
  const double apart = distance < kShortest ? kShortest : distance, t = (log_c - path) / apart - 0.5 * apart;
  const double log_mass = path + log(Residual(apart, t).survival(t));
  return log_mass == log_mass ? log_mass : -INFINITY;
}

// u <= (r - c)_+ / mass.
CSPD_HD bool passes(double u, double log_ratio, double log_c, double log_mass) {
  return log_ratio > log_c && log(u) <= log_ratio + log(-expm1(log_c - log_ratio)) - log_mass;
}

// log (c + mass), c > 0.
CSPD_HD double log_sum(double log_c, double log_mass) {
  return fmax(log_c, log_mass) + log1p(exp(-fabs(log_c - log_mass)));
}

}  // namespace cspd
