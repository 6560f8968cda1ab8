// Verdicts by their definition: every token walks through every try, on the host, from the arithmetic that kernels and
// host share.
#pragma once

#include "cspd/gaussian.cuh"
#include "cspd/parameters.h"
#include "cspd/philox.cuh"
#include "device.h"
#include "random.h"

struct Verdicts {
  std::vector<float> log_ratio, token;
  std::vector<std::uint8_t> accepted;
  std::vector<std::int32_t> tries, candidate;
};

// What is judged. ``offset`` floats lie between a boundary of 16 bytes and the start of each matrix.
struct Window {
  std::int64_t tokens;
  int channels;
  std::vector<float> x, mean_q, log_q, mean_p, log_p, sample, path_q, path_p;
  std::vector<float> relaxations;  // empty: ``relaxation``
  float relaxation = 1.0f;
  std::vector<std::int64_t> rows;
  std::uint64_t seed = 0xfedcba9876543210;
  int max_tries = 100;
  bool released = false;

  // Models that overlap, x of the draft's; scales are equal where ``one_sigma``.
  Window(std::int64_t tokens, int channels, bool one_sigma, std::uint64_t random_seed)
      : tokens(tokens), channels(channels) {
    Random random(random_seed);
    const auto count = static_cast<std::size_t>(tokens * channels);
    const double apart = 1.0 / std::sqrt(channels + 1.0);
    for (auto* matrix : {&x, &mean_q, &log_q, &mean_p, &log_p, &sample}) *matrix = random.normals(count);
    for (std::size_t i = 0; i < count; ++i) {
      log_p[i] = 0.7f * log_p[i] - 1.0f;
      log_q[i] = one_sigma ? log_p[i] : log_p[i] + static_cast<float>(0.5 * apart) * log_q[i];
      mean_q[i] = mean_p[i] + static_cast<float>(apart) * std::exp(log_p[i]) * mean_q[i];
      x[i] = mean_q[i] + std::exp(log_q[i]) * x[i];
    }
    path_q = random.normals(static_cast<std::size_t>(tokens), 0.5);
    path_p = random.normals(static_cast<std::size_t>(tokens), 0.5);
    for (std::int64_t i = 0; i < tokens; ++i) rows.push_back((i * 7919) % 1000 + (std::int64_t{1} << 33) * (i % 3));
  }

  cspd::Gaussians at(std::int64_t token, int channel) const {
    const auto i = static_cast<std::size_t>(token * channels + channel);
    return {mean_q[i], log_q[i], mean_p[i], log_p[i]};
  }
  float path(std::int64_t token) const { return cspd::path_term(path_q[token], path_p[token], released); }
  float relaxation_of(std::int64_t token) const {
    const float value = relaxations.empty() ? relaxation : relaxations[token];
    return value > 0.0f ? value : NAN;
  }
};

// A number, and how far from it float32 may come.
struct Estimate {
  double value, error;
};

inline Estimate plain_log_ratio(const Window& window, std::int64_t token, const float* x, float relaxation) {
  double sum = window.path(token), size = 1.0 + std::fabs(sum);
  for (int c = 0; c < window.channels; ++c) {
    const auto g = window.at(token, c);
    sum += cspd::log_ratio_term(x[c], g, relaxation);
    const double a = (x[c] - g.mean_p) * cspd::inverse_std(g.log_p), b = (x[c] - g.mean_q) * cspd::inverse_std(g.log_q);
    size += (a * a + b * b) / (relaxation * relaxation) + std::fabs(g.log_p - g.log_q);
  }
  return {std::isnan(sum) ? -INFINITY : sum, 2e-6 * size};
}

// The outcome of one token. Not ``clear`` where rounding may have decided.
struct Outcome {
  float log_ratio;
  double ratio_error;
  bool accepted, clear = true;
  int tries = -1;
  std::vector<double> token;
};

inline double plain_inverse(const cspd::Residual& residual, double t_0, double u) {
  double low = std::fmax(t_0, -cspd::kFarthest), high = 2 * cspd::kFarthest;
  const double goal = u * residual.survival(low);
  for (int i = 0; i < 60; ++i) {
    const double middle = 0.5 * (low + high);
    (residual.survival(middle) > goal ? low : high) = middle;
  }
  return low;
}

inline std::vector<double> proposal_of(const Window& window, std::int64_t token, int index) {
  std::vector<double> n(window.channels);
  for (int c = 0; c < window.channels; ++c) {
    n[c] = cspd::normal_at(window.seed, window.rows[token], index, c, cspd::kStreamProposal);
  }
  return n;
}

inline bool redraw_by_rejection(const Window& window, std::int64_t token, int index, double log_c, Outcome& outcome) {
  auto y = proposal_of(window, token, index);
  std::vector<float> rounded;
  for (int c = 0; c < window.channels; ++c) {
    const auto g = window.at(token, c);
    y[c] = g.mean_p + std::exp(static_cast<double>(g.log_p)) * y[c];
    rounded.push_back(static_cast<float>(y[c]));
  }
  const auto ratio = plain_log_ratio(window, token, rounded.data(), 1.0f);
  const double u = cspd::uniform_at(window.seed, window.rows[token], index), kept = -std::expm1(log_c - ratio.value);
  const double weight = std::isinf(ratio.value) ? 0.0 : std::exp(log_c - ratio.value);
  if (std::fabs(u - kept) <= ratio.error * weight + 1e-6) outcome.clear = false;
  if (!(u <= kept)) return false;
  outcome.token = y;
  return true;
}

// (mu_p - mu_q) / sigma_p, and its length.
struct Apart {
  std::vector<double> d;
  double distance;
};

inline Apart apart(const Window& window, std::int64_t token) {
  Apart result = {{}, 0.0};
  for (int c = 0; c < window.channels; ++c) {
    const auto g = window.at(token, c);
    result.d.push_back((static_cast<double>(g.mean_p) - g.mean_q) * std::exp(-static_cast<double>(g.log_p)));
    result.distance += result.d[c] * result.d[c];
  }
  result.distance = std::sqrt(result.distance);
  return result;
}

inline bool redraw_in_closed_form(const Window& window, std::int64_t token, double log_c, Outcome& outcome) {
  const auto [d, distance] = apart(window, token);
  double across = 0.0;
  const double t_0 = -0.5 * distance - (window.path(token) - log_c) / distance;
  if (!(t_0 <= cspd::kFarthest) || !std::isfinite(distance)) return false;
  const double u = cspd::uniform_at(window.seed, window.rows[token], 1);
  const double t = plain_inverse(cspd::Residual(std::fmax(distance, cspd::kShortest), t_0), t_0, u);
  auto y = proposal_of(window, token, 1);
  for (int c = 0; c < window.channels; ++c) across += y[c] * d[c] / distance;
  for (int c = 0; c < window.channels; ++c) {
    const auto g = window.at(token, c);
    y[c] = g.mean_p + std::exp(static_cast<double>(g.log_p)) * (y[c] + (t - across) * d[c] / distance);
    if (!std::isfinite(static_cast<float>(y[c]))) return false;
  }
  outcome.token = y;
  return true;
}

// Of a token that was rejected: its redraw, from what is left above c, or the target's own draw.
inline void redraw(const Window& window, std::int64_t token, bool closed_form, double log_c, Outcome& outcome) {
  const int tries = closed_form ? std::min(window.max_tries, 1) : window.max_tries;
  for (int k = 1; k <= tries; ++k) {
    if (closed_form ? redraw_in_closed_form(window, token, log_c, outcome)
                    : redraw_by_rejection(window, token, k, log_c, outcome)) {
      outcome.tries = k;
      return;
    }
  }
  const auto start = window.sample.begin() + token * window.channels;
  outcome.token.assign(start, start + window.channels);
}

inline Outcome judge(const Window& window, std::int64_t token, bool closed_form) {
  const auto start = static_cast<std::size_t>(token * window.channels);
  const auto ratio = plain_log_ratio(window, token, window.x.data() + start, window.relaxation_of(token));
  const double log_u = std::log(static_cast<double>(cspd::uniform_at(window.seed, window.rows[token], 0)));
  Outcome outcome = {static_cast<float>(ratio.value), ratio.error, log_u <= ratio.value, true, -1, {}};
  outcome.clear = std::isinf(ratio.value) || std::fabs(log_u - ratio.value) > ratio.error + 1e-6;
  if (outcome.accepted) {
    outcome.tries = 0;
    outcome.token.assign(window.x.begin() + start, window.x.begin() + start + window.channels);
    return outcome;
  }
  redraw(window, token, closed_form, 0.0, outcome);
  return outcome;
}
