// Philox, its addresses, and the uniforms and normals made from it.
#include <array>

#include "check.h"
#include "cspd/philox.cuh"
#include "random.h"

namespace {

constexpr double kP = 1e-4;  // a correct generator fails a statistical test of fixed seed with this probability

using Four = std::array<std::uint32_t, 4>;

// Philox 4x32-10 as the paper has it: S-boxes of two words, keys that grow by a Weyl sequence.
Four plain_philox(std::array<std::uint32_t, 2> key, Four counter) {
  for (std::uint32_t round = 0; round < 10; ++round) {
    const std::uint32_t k[] = {key[0] + round * 0x9E3779B9u, key[1] + round * 0xBB67AE85u};
    const unsigned __int128 left = static_cast<unsigned __int128>(counter[0]) * 0xD2511F53u;
    const unsigned __int128 right = static_cast<unsigned __int128>(counter[2]) * 0xCD9E8D57u;
    counter = {static_cast<std::uint32_t>(right / 0x100000000u) ^ counter[1] ^ k[0], static_cast<std::uint32_t>(right),
               static_cast<std::uint32_t>(left / 0x100000000u) ^ counter[3] ^ k[1], static_cast<std::uint32_t>(left)};
  }
  return counter;
}

void check_words(const cspd::Words& got, const Four& expected) {
  for (int i = 0; i < 4; ++i) CHECK_EQUAL(got.v[i], expected[i]);
}

// Random123's kat_vectors for philox4x32-10: counter, key, output.
void published_vectors() {
  constexpr std::uint32_t kOnes = 0xffffffff;
  check_words(cspd::philox(0, 0, 0, 0, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check_words(cspd::philox(kOnes, kOnes, kOnes, kOnes, kOnes, kOnes), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check_words(cspd::philox(0xa4093822, 0x299f31d0, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

void addresses() {
  Random random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t seed = random.bits(), row = random.bits();
    const auto index = static_cast<std::uint32_t>(random.bits());
    const std::uint32_t group = random.bits() & 0xffffff, stream = random.bits() % 4;
    const Four counter = {static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), index,
                          stream * 0x1000000u + group};
    check_words(cspd::words_at(seed, static_cast<std::int64_t>(row), index, group, static_cast<cspd::Stream>(stream)),
                plain_philox({static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}, counter));
  }
  CHECK_EQUAL(static_cast<int>(cspd::kStreamStep), 0);
  CHECK_EQUAL(static_cast<int>(cspd::kStreamXT), 1);
  CHECK_EQUAL(static_cast<int>(cspd::kStreamUniform), 2);
  CHECK_EQUAL(static_cast<int>(cspd::kStreamProposal), 3);
}

void uniforms() {
  CHECK_EQUAL(cspd::uniform(0), 0x1p-33f);
  CHECK_EQUAL(cspd::uniform(1), 1.5f * 0x1p-32f);
  CHECK_EQUAL(cspd::uniform(0xffffffff), 1.0f);
  Random random(2);
  for (int i = 0; i < 10000; ++i) {
    const auto word = static_cast<std::uint32_t>(random.bits() >> random.integer(32, 63));
    const float u = cspd::uniform(word);
    CHECK(u > 0.0f && u <= 1.0f);
    CHECK_NEAR(u, (word + 0.5L) / 0x1p32L, 0x1p-23L);
  }
  std::vector<double> sample;
  for (int row = 0; row < 50000; ++row) sample.push_back(cspd::uniform_at(2024, row, 5));
  const auto uniform_cdf = [](double u) { return u; };
  CHECK(ks_p_value(sample, uniform_cdf) > kP);
  for (int row = 0; row < 20; ++row) {
    const auto words = plain_philox({2024, 0}, {static_cast<std::uint32_t>(row), 0, 5, 2u << 24});
    CHECK_EQUAL(cspd::uniform_at(2024, row, 5), cspd::uniform(words[0]));
  }
}

void check_box_muller(const cspd::Words& words, const cspd::Normals& normals) {
  for (int pair = 0; pair < 4; pair += 2) {
    const long double u = cspd::uniform(words.v[pair]), turns = cspd::uniform(words.v[pair + 1]);
    const long double radius = std::sqrt(-2.0L * std::log(u)), angle = 2.0L * acosl(-1.0L) * turns;
    CHECK_NEAR_SCALE(normals.v[pair], radius * std::cos(angle), 1e-6L, radius);
    CHECK_NEAR_SCALE(normals.v[pair + 1], radius * std::sin(angle), 1e-6L, radius);
  }
}

void normals() {
  Random random(3);
  for (int i = 0; i < 5000; ++i) {
    const std::uint64_t seed = random.bits();
    const auto row = static_cast<std::int64_t>(random.bits());
    const std::uint32_t index = random.bits() % 1000, group = random.bits() % 64;
    const auto stream = static_cast<cspd::Stream>(random.bits() % 4);
    const auto four = cspd::normals_at(seed, row, index, group, stream);
    check_box_muller(cspd::words_at(seed, row, index, group, stream), four);
    for (int c = 0; c < 4; ++c) {
      CHECK_EQUAL(cspd::normal_at(seed, row, index, static_cast<int>(4 * group) + c, stream), four.v[c]);
    }
  }
}

void normals_are_normal() {
  constexpr int kRows = 25000;
  std::vector<double> of_channel[4], all, squares;
  for (int row = 0; row < kRows; ++row) {
    const auto four = cspd::normals_at(7, row, 1, 0, cspd::kStreamProposal);
    double square = 0.0;
    for (int c = 0; c < 4; ++c) {
      of_channel[c].push_back(four.v[c]);
      all.push_back(four.v[c]);
      square += four.v[c] * four.v[c];
    }
    squares.push_back(square);
  }
  for (const auto& sample : of_channel) CHECK(ks_p_value(sample, normal_cdf) > kP);
  // Of four independent normals: chi squared with four degrees of freedom.
  CHECK(ks_p_value(squares, [](double s) { return 1.0 - std::exp(-s / 2) * (1.0 + s / 2); }) > kP);
  // A mean of n normals' powers has the variance that their even moments 1, 3, 15, 105 say; 3.9 sigma is p = 1e-4.
  const double variance[] = {0, 1, 2, 15, 96}, expected[] = {1, 0, 1, 0, 3};
  for (int power = 1; power <= 4; ++power) {
    double mean = 0.0;
    for (const double x : all) mean += std::pow(x, power) / static_cast<double>(all.size());
    CHECK(std::fabs(mean - expected[power]) < 3.9 * std::sqrt(variance[power] / static_cast<double>(all.size())));
  }
}

void sines_and_cosines() {
  Random random(4);
  std::vector<float> turns = {0.0f, 0x1p-33f, 0.125f, 0.25f, 0.5f, 0.75f, 1.0f};
  for (int i = 0; i < 20000; ++i) turns.push_back(static_cast<float>(random.uniform(0, 1)));
  for (const float t : turns) {
    float sine, cosine;
    cspd::sine_cosine_of_turns(t, &sine, &cosine);
    const long double angle = 2.0L * acosl(-1.0L) * t;
    CHECK_NEAR_SCALE(sine, std::sin(angle), 1.3e-7L, 1);
    CHECK_NEAR_SCALE(cosine, std::cos(angle), 1.3e-7L, 1);
  }
}

}  // namespace

int main() {
  published_vectors();
  addresses();
  uniforms();
  normals();
  normals_are_normal();
  sines_and_cosines();
  return check::finish("philox");
}
