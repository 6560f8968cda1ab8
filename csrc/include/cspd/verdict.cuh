// Kernels that judge tokens: the log density ratio of two chains, and acceptance-rejection of one candidate a token or
// of several.
#pragma once

#include "cspd/philox.cuh"
#include "cspd/token.cuh"

namespace cspd {

constexpr int kVerdictThreads = 128;

template <int Lanes, int Quads, bool Aligned>
__global__ void __launch_bounds__(kVerdictThreads) log_density_ratio_kernel(Judged judged, float* out) {
  judged.aligned = Aligned;  // known to the compiler, so that all loads are under way before the first is waited for
  const std::int64_t warps = static_cast<std::int64_t>(blockIdx.x) * (kVerdictThreads / kWarp) + warp();
  const std::int64_t token = warps * (kWarp / Lanes) + lane() / Lanes;
  // Lanes beyond the last token judge it once more: a warp stays whole.
  const std::int64_t known = token < judged.tokens ? token : judged.tokens - 1;
  const auto x = load_row<Lanes, Quads>(judged.x + known * judged.channels, judged);
  const auto models = load_models<Lanes, Quads, false>(judged, {}, known, 0);
  const float relaxation = relaxation_of<false>(judged, {}, known, 0);
  const float ratio = log_ratio_of<Lanes, Quads>(x, models, relaxation, judged.channels);
  if (lane() % Lanes == 0 && token < judged.tokens) out[token] = ratio;
}

// The seed. The closed form reads it anew: its widest kernel has no registers left to keep it.
__device__ __forceinline__ std::uint64_t seed_of(const Redraw& redraw) {
  return redraw.seeds ? static_cast<std::uint64_t>(*redraw.seeds) : redraw.seed;
}

// The normals of try ``index``, 0 beyond the last channel.
template <int Lanes, int Quads>
__device__ __forceinline__ Channels<Quads> proposal_normals(std::uint64_t seed, std::int64_t row, int index,
                                                            int channels) {
  Channels<Quads> normals;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    const int first = first_channel<Lanes>(quad);
    const Normals four = normals_at(seed, row, index, first / 4, kStreamProposal);
#pragma unroll
    for (int i = 0; i < 4; ++i) normals.v[quad][i] = first + i < channels ? four.v[i] : 0.0f;
  }
  return normals;
}

// Tries of one token, 32 / Lanes at a time: y ~ N(mu_p, sigma_p^2), kept where u <= 1 - c / r_1(y).
//
// Returns the first try that is kept, which has stored its token, or 0. All lanes of the warp work on one token.
template <int Lanes, int Quads>
__device__ __forceinline__ int by_rejection(const Judged& judged, const Redraw& redraw, std::uint64_t seed,
                                            std::int64_t token, const Models<Quads>& models, double log_c) {
  const std::int64_t row = redraw.rows[token];
  constexpr int kAtOnce = kWarp / Lanes;
  for (int first = 1; first <= redraw.max_tries; first += kAtOnce) {
    const int index = first + lane() / Lanes;
    auto y = proposal_normals<Lanes, Quads>(seed, row, index, judged.channels);
#pragma unroll
    for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y.v[quad][i] = models.mean_p.v[quad][i] + expf(models.log_p.v[quad][i]) * y.v[quad][i];
      }
    }
    const float ratio = log_ratio_of<Lanes, Quads>(y, models, 1.0f, judged.channels);
    const float above = ratio - static_cast<float>(log_c);
    const bool kept = index <= redraw.max_tries && uniform_at(seed, row, index) <= -expm1f(-above);
    const unsigned votes = ballot(kept);
    if (votes != 0) {
      const int winner = lowest_bit(votes) / Lanes;
      if (lane() / Lanes == winner) store_row<Lanes, Quads>(redraw.token + token * judged.channels, y, judged);
      return first + winner;
    }
  }
  return 0;
}

// t with S(t) = u S(t_0): every round, each lane looks at one of 32 places of the interval.
__device__ __forceinline__ double invert(const Residual& residual, double t_0, double u) {
  double low = fmax(t_0, -kFarthest);
  const double goal = u * residual.survival(low);
  double width = (2.0 * kFarthest - low) / (kPoints + 1);
  for (int round = 0; round < kRounds; ++round) {
    const bool beyond = residual.survival(low + width * (1 + lane())) > goal;
    low += width * count_bits(ballot(beyond));
    width /= kPoints + 1;
  }
  return low;
}

// (mu_p - mu_q) / sigma_p of one channel.
__device__ __forceinline__ double difference(const Gaussians& g) {
  return (static_cast<double>(g.mean_p) - static_cast<double>(g.mean_q)) * exp(-static_cast<double>(g.log_p));
}

// How far the models are apart, in sigmas of the target.
template <int Lanes, int Quads>
__device__ __forceinline__ double distance_of(const Models<Quads>& models, int channels) {
  double square = 0.0;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double d = difference(models.at(quad, i));
      square += first_channel<Lanes>(quad) + i < channels ? d * d : 0.0;
    }
  }
  return sqrt(sum_over<Lanes>(square));
}

// The first proposal, its component along the models' difference drawn by inverting its distribution function; scalars
// in float64. Returns 1, with the token stored, or 0 where there is no such draw.
template <int Lanes, int Quads>
__device__ __forceinline__ int in_closed_form(const Judged& judged, const Redraw& redraw, std::int64_t token,
                                              const Models<Quads>& models, double log_c) {
  const std::int64_t row = redraw.rows[token];
  auto n = proposal_normals<Lanes, Quads>(seed_of(redraw), row, 1, judged.channels);
  double d[Quads][4], square = 0.0;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double apart = difference(models.at(quad, i));
      d[quad][i] = first_channel<Lanes>(quad) + i < judged.channels ? apart : 0.0;
      square += d[quad][i] * d[quad][i];
    }
  }
  const double distance = sqrt(sum_over<Lanes>(square));
  const double t_0 = -0.5 * distance - (static_cast<double>(models.path) - log_c) / distance;
  // At temperature 0 d is not finite.
  const bool exists = t_0 <= kFarthest && distance < static_cast<double>(INFINITY) && redraw.max_tries > 0;
  const Residual residual(fmax(distance, kShortest), t_0);
  const double t = invert(residual, t_0, static_cast<double>(uniform_at(seed_of(redraw), row, 1)));
  const double inverse = 1.0 / fmax(distance, 1e-200);
  float across = 0.0f;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) across += n.v[quad][i] * static_cast<float>(d[quad][i] * inverse);
  }
  across = sum_over<Lanes>(across);
  bool finite = true;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float moved = (static_cast<float>(t) - across) * static_cast<float>(d[quad][i] * inverse);
      const Gaussians g = models.at(quad, i);
      const float y = g.mean_p + expf(g.log_p) * (n.v[quad][i] + moved);
      finite = finite && fabsf(y) < INFINITY;
      n.v[quad][i] = y;
    }
  }
  if (!exists || ballot(!finite) != 0) return 0;
  if (lane() < Lanes) store_row<Lanes, Quads>(redraw.token + token * judged.channels, n, judged);
  return 1;
}

// What the candidates of a token leave to its redraw: which one was accepted, else -1, and c.
struct Tried {
  int candidate;
  double log_c;
};

// The candidates after the first, in all lanes of their token: what is accepted is stored. A warp goes on together.
template <int Lanes, int Quads>
__device__ __forceinline__ Tried try_others(const Judged& judged, const Redraw& redraw, const Candidates& candidates,
                                            std::uint64_t seed, std::int64_t token, bool mine, bool first) {
  Tried tried = {first ? 0 : -1, 0.0};
  Models<Quads> models;
  double distance = 0.0;
  for (int i = 1; i < candidates.count; ++i) {
    const std::int64_t row = row_of<true>(token, i, candidates.count);
    const auto x = load_row<Lanes, Quads>(judged.x + row * judged.channels, judged);
    if (i == 1 || candidates.chains) models = load_models<Lanes, Quads, true>(judged, candidates, token, i);
    const float relaxation = relaxation_of<true>(judged, candidates, token, i);
    const float ratio = log_ratio_of<Lanes, Quads>(x, models, relaxation, judged.channels);
    if (mine && lane() % Lanes == 0) redraw.log_ratio[row] = ratio;
    if (ballot(tried.candidate < 0) == 0) continue;
    if (i == 1 || candidates.chains) distance = distance_of<Lanes, Quads>(models, judged.channels);
    const double log_mass = log_mass_above(tried.log_c, distance, models.path);
    const float u = uniform_at(seed, candidate_address(redraw.rows[token], i), 0);
    const bool keep = tried.candidate < 0 && passes(u, ratio, tried.log_c, log_mass);
    tried.log_c = log_sum(tried.log_c, log_mass);
    if (keep) tried.candidate = i;
    if (mine && keep) store_row<Lanes, Quads>(redraw.token + token * judged.channels, x, judged);
  }
  return tried;
}

// Accept test and redraw: a warp judges its tokens together, candidate after candidate where there are many, then
// redraws the rejected tokens one after another.
template <int Lanes, int Quads, bool ClosedForm, bool Many>
__global__ void __launch_bounds__(kVerdictThreads, 3)
    accept_reject_kernel(Judged judged, Redraw redraw, Candidates candidates) {
  const std::int64_t warps = static_cast<std::int64_t>(blockIdx.x) * (kVerdictThreads / kWarp) + warp();
  const std::int64_t start = warps * redraw.tokens_per_warp;
  if (start >= judged.tokens) return;
  const int slot = lane() / Lanes;
  const std::int64_t token = start + slot;
  const bool mine = slot < redraw.tokens_per_warp && token < judged.tokens;
  const std::int64_t known = mine ? token : start, row = row_of<Many>(known, 0, candidates.count);
  const auto x = load_row<Lanes, Quads>(judged.x + row * judged.channels, judged);
  float ratio;
  {
    const auto models = load_models<Lanes, Quads, Many>(judged, candidates, known, 0);
    ratio = log_ratio_of<Lanes, Quads>(x, models, relaxation_of<Many>(judged, candidates, known, 0), judged.channels);
  }
  const std::uint64_t seed = seed_of(redraw);
  bool keep = logf(uniform_at(seed, redraw.rows[known], 0)) <= ratio;
  const bool speaks = mine && lane() % Lanes == 0;
  if (speaks) {
    redraw.log_ratio[row_of<Many>(token, 0, candidates.count)] = ratio;
    redraw.accepted[token] = keep;
    if (keep) redraw.tries[token] = 0;
  }
  if (mine && keep) store_row<Lanes, Quads>(redraw.token + token * judged.channels, x, judged);
  double log_c = 0.0;
  if constexpr (Many) {
    const Tried tried = try_others<Lanes, Quads>(judged, redraw, candidates, seed, known, mine, keep);
    keep = tried.candidate >= 0;
    log_c = tried.log_c;
    if (speaks) {
      candidates.accepted[token] = tried.candidate;
      redraw.accepted[token] = keep;
      if (keep) redraw.tries[token] = 0;
    }
  }
  for (unsigned rejected = ballot(speaks && !keep); rejected != 0; rejected &= rejected - 1) {
    const std::int64_t at = start + lowest_bit(rejected) / Lanes;
    const auto models = load_models<Lanes, Quads, Many>(judged, candidates, at, 0);
    const double left = Many ? shuffle(log_c, lowest_bit(rejected)) : 0.0;
    int kept;
    if constexpr (ClosedForm) {
      kept = in_closed_form<Lanes, Quads>(judged, redraw, at, models, left);
    } else {
      kept = by_rejection<Lanes, Quads>(judged, redraw, seed, at, models, left);
    }
    if (kept == 0 && lane() < Lanes) {
      const std::int64_t sampled = row_of<Many>(at, 0, candidates.sample);
      const auto drawn = load_row<Lanes, Quads>(redraw.sample + sampled * judged.channels, judged);
      store_row<Lanes, Quads>(redraw.token + at * judged.channels, drawn, judged);
    }
    if (lane() == 0) redraw.tries[at] = kept == 0 ? -1 : kept;
  }
}

}  // namespace cspd
