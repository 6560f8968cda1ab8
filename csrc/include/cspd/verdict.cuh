// Kernels that judge tokens: the log density ratio of two chains, and acceptance-rejection.
//
// A token is held by the fewest lanes of a warp, a power of two, that have a quad of four channels each; two quads
// beyond 128 channels. So a warp judges 32 / Lanes tokens at a time, with 16-byte loads, and the order of a token's
// sums depends on its channels alone, never on its batch.
#pragma once

#include "cspd/device.cuh"
#include "cspd/gaussian.cuh"
#include "cspd/parameters.h"
#include "cspd/philox.cuh"

namespace cspd {

constexpr int kVerdictThreads = 128;

// One lane's channels of a row, 0 beyond the last.
template <int Quads>
struct Channels {
  float v[Quads][4];
};

template <int Lanes>
__device__ __forceinline__ int first_channel(int quad) {
  return 4 * (lane() % Lanes + Lanes * quad);
}

template <int Lanes, int Quads>
__device__ __forceinline__ Channels<Quads> load_row(const float* row, const Judged& judged) {
  Channels<Quads> values;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    const int first = first_channel<Lanes>(quad);
    if (judged.aligned) {
      Vector<float, 4> loaded = {};
      if (first < judged.channels) loaded = *reinterpret_cast<const Vector<float, 4>*>(row + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) values.v[quad][i] = loaded.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values.v[quad][i] = first + i < judged.channels ? row[first + i] : 0.0f;
    }
  }
  return values;
}

template <int Lanes, int Quads>
__device__ __forceinline__ void store_row(float* row, const Channels<Quads>& values, const Judged& judged) {
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    const int first = first_channel<Lanes>(quad);
    if (judged.aligned) {
      Vector<float, 4> stored;
#pragma unroll
      for (int i = 0; i < 4; ++i) stored.v[i] = values.v[quad][i];
      if (first < judged.channels) *reinterpret_cast<Vector<float, 4>*>(row + first) = stored;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < judged.channels) row[first + i] = values.v[quad][i];
      }
    }
  }
}

// Both models of one token.
template <int Quads>
struct Models {
  Channels<Quads> mean_q, log_q, mean_p, log_p;
  float path;

  __device__ __forceinline__ Gaussians at(int quad, int i) const {
    return {mean_q.v[quad][i], log_q.v[quad][i], mean_p.v[quad][i], log_p.v[quad][i]};
  }
};

template <int Lanes, int Quads>
__device__ __forceinline__ Models<Quads> load_models(const Judged& judged, std::int64_t token) {
  const std::int64_t row = token * judged.channels;
  return {load_row<Lanes, Quads>(judged.draft.mean + row, judged),
          load_row<Lanes, Quads>(judged.draft.log_std + row, judged),
          load_row<Lanes, Quads>(judged.target.mean + row, judged),
          load_row<Lanes, Quads>(judged.target.log_std + row, judged),
          path_term(judged.draft.path[token], judged.target.path[token], judged.released)};
}

// log r of one token, in all of its lanes.
template <int Lanes, int Quads>
__device__ __forceinline__ float log_ratio_of(const Channels<Quads>& x, const Models<Quads>& models, float relaxation,
                                              int channels) {
  float sum = 0.0f;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float term = log_ratio_term(x.v[quad][i], models.at(quad, i), relaxation);
      sum += first_channel<Lanes>(quad) + i < channels ? term : 0.0f;
    }
  }
  return judged(sum_over<Lanes>(sum) + models.path);
}

__device__ __forceinline__ float relaxation_of(const Judged& judged, std::int64_t token) {
  const float relaxation = judged.relaxations ? judged.relaxations[token] : judged.relaxation;
  return relaxation > 0.0f ? relaxation : NAN;
}

template <int Lanes, int Quads, bool Aligned>
__global__ void __launch_bounds__(kVerdictThreads) log_density_ratio_kernel(Judged judged, float* out) {
  judged.aligned = Aligned;  // known to the compiler, so that all loads are under way before the first is waited for
  const std::int64_t warps = static_cast<std::int64_t>(blockIdx.x) * (kVerdictThreads / kWarp) + warp();
  const std::int64_t token = warps * (kWarp / Lanes) + lane() / Lanes;
  // Lanes beyond the last token judge it once more: a warp stays whole.
  const std::int64_t known = token < judged.tokens ? token : judged.tokens - 1;
  const auto x = load_row<Lanes, Quads>(judged.x + known * judged.channels, judged);
  const auto models = load_models<Lanes, Quads>(judged, known);
  const float ratio = log_ratio_of<Lanes, Quads>(x, models, relaxation_of(judged, known), judged.channels);
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

// Tries of one token, 32 / Lanes at a time: y ~ N(mu_p, sigma_p^2), kept where u <= 1 - exp(-log r_1(y)).
//
// Returns the first try that is kept, which has stored its token, or 0. All lanes of the warp work on one token.
template <int Lanes, int Quads>
__device__ __forceinline__ int by_rejection(const Judged& judged, const Redraw& redraw, std::uint64_t seed,
                                            std::int64_t token, const Models<Quads>& models) {
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
    const bool kept = index <= redraw.max_tries && uniform_at(seed, row, index) <= -expm1f(-ratio);
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

// The first proposal, its component along the models' difference drawn by inverting its distribution function; scalars
// in float64. Returns 1, with the token stored, or 0 where there is no such draw.
template <int Lanes, int Quads>
__device__ __forceinline__ int in_closed_form(const Judged& judged, const Redraw& redraw, std::int64_t token,
                                              const Models<Quads>& models) {
  const std::int64_t row = redraw.rows[token];
  auto n = proposal_normals<Lanes, Quads>(seed_of(redraw), row, 1, judged.channels);
  double d[Quads][4], square = 0.0;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Gaussians g = models.at(quad, i);
      const double apart =
          (static_cast<double>(g.mean_p) - static_cast<double>(g.mean_q)) * exp(-static_cast<double>(g.log_p));
      d[quad][i] = first_channel<Lanes>(quad) + i < judged.channels ? apart : 0.0;
      square += d[quad][i] * d[quad][i];
    }
  }
  const double distance = sqrt(sum_over<Lanes>(square));
  const double t_0 = -0.5 * distance - static_cast<double>(models.path) / distance;
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

// Accept test and redraw: a warp judges its tokens together, then redraws the rejected ones one after another.
template <int Lanes, int Quads, bool ClosedForm>
__global__ void __launch_bounds__(kVerdictThreads, 3) accept_reject_kernel(Judged judged, Redraw redraw) {
  const std::int64_t warps = static_cast<std::int64_t>(blockIdx.x) * (kVerdictThreads / kWarp) + warp();
  const std::int64_t start = warps * redraw.tokens_per_warp;
  if (start >= judged.tokens) return;
  const int slot = lane() / Lanes;
  const std::int64_t token = start + slot;
  const bool mine = slot < redraw.tokens_per_warp && token < judged.tokens;
  const std::int64_t known = mine ? token : start;
  const auto x = load_row<Lanes, Quads>(judged.x + known * judged.channels, judged);
  float ratio;
  {
    const auto models = load_models<Lanes, Quads>(judged, known);
    ratio = log_ratio_of<Lanes, Quads>(x, models, relaxation_of(judged, known), judged.channels);
  }
  const std::uint64_t seed = seed_of(redraw);
  const bool keep = logf(uniform_at(seed, redraw.rows[known], 0)) <= ratio;
  const bool speaks = mine && lane() % Lanes == 0;
  if (speaks) {
    redraw.log_ratio[token] = ratio;
    redraw.accepted[token] = keep;
    if (keep) redraw.tries[token] = 0;
  }
  if (mine && keep) store_row<Lanes, Quads>(redraw.token + token * judged.channels, x, judged);
  for (unsigned rejected = ballot(speaks && !keep); rejected != 0; rejected &= rejected - 1) {
    const std::int64_t at = start + lowest_bit(rejected) / Lanes;
    const auto models = load_models<Lanes, Quads>(judged, at);
    int kept;
    if constexpr (ClosedForm) {
      kept = in_closed_form<Lanes, Quads>(judged, redraw, at, models);
    } else {
      kept = by_rejection<Lanes, Quads>(judged, redraw, seed, at, models);
    }
    if (kept == 0 && lane() < Lanes) {
      const auto drawn = load_row<Lanes, Quads>(redraw.sample + at * judged.channels, judged);
      store_row<Lanes, Quads>(redraw.token + at * judged.channels, drawn, judged);
    }
    if (lane() == 0) redraw.tries[at] = kept == 0 ? -1 : kept;
  }
}

}  // namespace cspd
