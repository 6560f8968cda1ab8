// Counter-based random numbers, at the addresses and in the layout of cspd_kernels/noise.py.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "cspd/portable.cuh"

namespace cspd {

enum Stream : std::uint32_t { kStreamStep = 0, kStreamXT = 1, kStreamUniform = 2, kStreamProposal = 3 };

// Between the addresses of a token's candidates.
constexpr std::int64_t kCandidateStride = std::int64_t{1} << 48;

using Words = Vector<std::uint32_t, 4>;
using Normals = Vector<float, 4>;

// Philox 4x32-10: four counter words and two key words to four random words.
CSPD_HD Words philox(std::uint32_t k0, std::uint32_t k1, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                     std::uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0, p1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The words at an address; ``group`` holds the channels 4 group .. 4 group + 3.
CSPD_HD Words words_at(std::uint64_t seed, std::int64_t row, std::uint32_t index, std::uint32_t group, Stream stream) {
  const auto address = static_cast<std::uint64_t>(row);
  return philox(static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32), index,
                group | stream << 24);
}

// A uniform in (0, 1] from 32 random bits.
CSPD_HD float uniform(std::uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

// The uniform of try ``index`` of accept_reject.
CSPD_HD float uniform_at(std::uint64_t seed, std::int64_t row, std::uint32_t index) {
  return uniform(words_at(seed, row, index, 0, kStreamUniform).v[0]);
}

// The address of candidate i of the token at ``row``. All 64 bits are an address: it wraps around.
CSPD_HD std::int64_t candidate_address(std::int64_t row, int i) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(row) + static_cast<std::uint64_t>(i) * kCandidateStride);
}

// Four standard normals, by Box-Muller.
CSPD_HD Normals normals_at(std::uint64_t seed, std::int64_t row, std::uint32_t index, std::uint32_t group,
                           Stream stream) {
  const Words words = words_at(seed, row, index, group, stream);
  Normals normals;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(-2.0f * logf(uniform(words.v[pair])));
    float sine, cosine;
    sine_cosine_of_turns(uniform(words.v[pair + 1]), &sine, &cosine);
    normals.v[pair] = radius * cosine;
    normals.v[pair + 1] = radius * sine;
  }
  return normals;
}

// The normal of one channel.
CSPD_HD float normal_at(std::uint64_t seed, std::int64_t row, std::uint32_t index, int channel, Stream stream) {
  const Normals normals = normals_at(seed, row, index, channel / 4, stream);
  const float low = channel % 2 ? normals.v[1] : normals.v[0], high = channel % 2 ? normals.v[3] : normals.v[2];
  return channel % 4 < 2 ? low : high;
}

}  // namespace cspd
