// One token in lanes of a warp: its channels, both models, its log density ratio.
//
// A token is held by the fewest lanes of a warp, a power of two, that have a quad of four channels each; two quads
// beyond 128 channels. So a warp judges 32 / Lanes tokens at a time, with 16-byte loads, and the order of a token's
// sums depends on its channels alone, never on its batch.
#pragma once

#include "cspd/device.cuh"
#include "cspd/gaussian.cuh"
#include "cspd/parameters.h"

namespace cspd {

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

// The row of a token's candidate where each token has ``rows`` of them: one for all candidates, or one a candidate.
template <bool Many>
__device__ __forceinline__ std::int64_t row_of(std::int64_t token, int candidate, int rows) {
  if constexpr (!Many) return token;
  return rows == 1 ? token : token * rows + candidate;
}

template <int Lanes, int Quads, bool Many>
__device__ __forceinline__ Models<Quads> load_models(const Judged& judged, const Candidates& candidates,
                                                     std::int64_t token, int candidate) {
  const auto load = [&](const float* matrix, int rows) {
    return load_row<Lanes, Quads>(matrix + row_of<Many>(token, candidate, rows) * judged.channels, judged);
  };
  const Chain &draft = judged.draft, &target = judged.target;
  return {load(draft.mean, candidates.draft.mean), load(draft.log_std, candidates.draft.log_std),
          load(target.mean, candidates.target.mean), load(target.log_std, candidates.target.log_std),
          path_term(draft.path[row_of<Many>(token, candidate, candidates.draft.path)],
                    target.path[row_of<Many>(token, candidate, candidates.target.path)], judged.released)};
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

template <bool Many>
__device__ __forceinline__ float relaxation_of(const Judged& judged, const Candidates& candidates, std::int64_t token,
                                               int candidate) {
  const std::int64_t row = row_of<Many>(token, candidate, candidates.relaxations);
  const float relaxation = judged.relaxations ? judged.relaxations[row] : judged.relaxation;
  return relaxation > 0.0f ? relaxation : NAN;
}

}  // namespace cspd
