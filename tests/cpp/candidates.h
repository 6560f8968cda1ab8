// Verdicts on several candidates by their definition, on the host: candidate i of every token is a window of its own.
#pragma once

#include <initializer_list>

#include "verdict_launches.h"

// Which matrices have a row for every candidate; the others have one for all, the first window's.
enum Own : unsigned {
  kOwnSample = 1,
  kOwnMeanQ = 2,
  kOwnLogQ = 4,
  kOwnPathQ = 8,
  kOwnMeanP = 16,
  kOwnLogP = 32,
  kOwnPathP = 64,
  kOwnRelaxation = 128,
  kOwnAll = 255,
};

struct Several {
  std::vector<Window> each;
  unsigned own;

  Several(int count, std::int64_t tokens, int channels, unsigned own, std::uint64_t random_seed) : own(own) {
    Random random(random_seed + 1000);
    for (int i = 0; i < count; ++i) each.emplace_back(tokens, channels, true, random_seed + i);
    for (auto& window : each) {
      for (const auto& [bit, matrix] : matrices()) {
        if (!(own & bit)) window.*matrix = each[0].*matrix;
      }
      const auto normals = random.normals(window.x.size());
      for (std::size_t i = 0; i < window.x.size(); ++i) {
        window.x[i] = window.mean_q[i] + std::exp(window.log_q[i]) * normals[i];
      }
    }
  }

  using Matrix = std::vector<float> Window::*;
  static std::vector<std::pair<unsigned, Matrix>> matrices() {
    return {{kOwnSample, &Window::sample}, {kOwnMeanQ, &Window::mean_q},          {kOwnLogQ, &Window::log_q},
            {kOwnPathQ, &Window::path_q},  {kOwnMeanP, &Window::mean_p},          {kOwnLogP, &Window::log_p},
            {kOwnPathP, &Window::path_p},  {kOwnRelaxation, &Window::relaxations}};
  }

  int count() const { return static_cast<int>(each.size()); }

  cspd::Candidates rows() const {
    const auto of = [this](unsigned bit) { return own & bit ? count() : 1; };
    return {count(),
            nullptr,
            {of(kOwnMeanQ), of(kOwnLogQ), of(kOwnPathQ)},
            {of(kOwnMeanP), of(kOwnLogP), of(kOwnPathP)},
            of(kOwnRelaxation),
            of(kOwnSample)};
  }

  // As the kernel reads it: candidates of a token side by side.
  Window packed() const {
    Window all = each[0];
    const auto interleave = [&](Matrix matrix) {
      const auto row = static_cast<std::ptrdiff_t>((each[0].*matrix).size()) / std::max<std::int64_t>(all.tokens, 1);
      (all.*matrix).clear();
      for (std::int64_t token = 0; token < all.tokens; ++token) {
        for (const auto& window : each) {
          const auto start = (window.*matrix).begin() + token * row;
          (all.*matrix).insert((all.*matrix).end(), start, start + row);
        }
      }
    };
    interleave(&Window::x);
    for (const auto& [bit, matrix] : matrices()) {
      if (own & bit) interleave(matrix);
    }
    return all;
  }

  Verdicts judged(bool closed_form, int multiprocessors, unsigned offsets = 0) const {
    const Window all = packed();
    const auto candidates = rows();
    return OnDevice(all, offsets, &candidates).accept_reject(closed_form, multiprocessors);
  }
};

// The integral of (e^path p - c q)_+ of Gaussians that have the target's sigma; 0 where it is no number.
inline long double mass_above(const Window& window, std::int64_t token, long double c) {
  const auto upper_tail = [](long double t) { return 0.5L * std::erfc(t / std::sqrt(2.0L)); };
  const long double distance = apart(window, token).distance, path = window.path(token);
  const long double by = distance < cspd::kShortest ? static_cast<long double>(cspd::kShortest) : distance;
  const long double t = (std::log(c) - path) / by - 0.5L * by;
  const long double mass = std::exp(path) * upper_tail(t) - c * upper_tail(t + by);
  return mass > 0.0L ? mass : 0.0L;
}

struct SeveralOutcome {
  Outcome outcome;
  int candidate;
  std::vector<Estimate> ratios;
};

inline SeveralOutcome judge(const Several& several, std::int64_t token, bool closed_form) {
  const Window& first = several.each[0];
  SeveralOutcome result = {{}, -1, {}};
  Outcome& outcome = result.outcome;
  long double c = 0.0L, mass = 1.0L;
  for (int i = 0; i < several.count(); ++i) {
    const Window& window = several.each[i];
    const float* x = window.x.data() + token * window.channels;
    const auto ratio = plain_log_ratio(window, token, x, window.relaxation_of(token));
    result.ratios.push_back(ratio);
    if (result.candidate >= 0) continue;
    if (i > 0) mass = mass_above(window, token, c);
    // Accepted where u <= (r - c) / mass.
    const double u = cspd::uniform_at(window.seed, window.rows[token] + (std::int64_t{1} << 48) * i, 0);
    const auto least = static_cast<double>(std::log(c + u * mass));
    if (!std::isinf(ratio.value) && std::fabs(ratio.value - least) <= ratio.error + 1e-6) outcome.clear = false;
    c += mass;
    if (!(ratio.value >= least)) continue;
    result.candidate = i;
    outcome.accepted = true;
    outcome.tries = 0;
    outcome.token.assign(x, x + window.channels);
  }
  if (!outcome.accepted) redraw(first, token, closed_form, static_cast<double>(std::log(c)), outcome);
  return result;
}
