// What kernels ask of a device: lanes that exchange values, products of tiles, copies in the background, and the
// arithmetic that host and device have in common.
#include "cspd/gaussian.cuh"
#include "cspd/philox.cuh"
#include "cspd/weights.cuh"
#include "device.h"
#include "random.h"

namespace {

using cspd::bfloat16;
using cspd::float16;
using device::Array;

template <int Lanes, typename T>
__global__ void sums_kernel(const T* values, T* sums) {
  sums[threadIdx.x] = cspd::sum_over<Lanes>(values[threadIdx.x]);
}

template <int Lanes, typename T>
void sums() {
  constexpr int kThreads = 96;  // three warps, which are not to mix
  std::vector<T> values(kThreads), expected(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = static_cast<T>((i * i) % 61 + i);
  for (int i = 0; i < kThreads; ++i) {
    for (int k = 0; k < Lanes; ++k) expected[i] += values[i / Lanes * Lanes + k];
  }
  const Array<T> in(values), out(kThreads);
  RUN(cspd::launch(sums_kernel<Lanes, T>, cspd::Grid{1, kThreads}, nullptr, in.get(), out.get()));
  CHECK_SAME_BITS(out.host(), expected);
}

__global__ void lanes_kernel(const std::int64_t* values, std::int64_t* shuffled, std::int64_t* crossed, unsigned* votes,
                             int* bits) {
  const auto i = threadIdx.x;
  shuffled[i] = cspd::shuffle(values[i], (cspd::lane() * 7 + 3) % 32);
  crossed[i] = cspd::shuffle_xor(values[i], 5);
  votes[i] = cspd::ballot(values[i] % 3 == 0);
  bits[2 * i] = cspd::lowest_bit(votes[i] >> cspd::lane());
  bits[2 * i + 1] = cspd::count_bits(votes[i]);
}

void lanes() {
  constexpr int kThreads = 64;
  std::vector<std::int64_t> values(kThreads);
  for (int i = 0; i < kThreads; ++i) values[i] = (std::int64_t{i} << 33) + i * i;
  const Array<std::int64_t> in(values), shuffled(kThreads), crossed(kThreads);
  const Array<unsigned> votes(kThreads);
  const Array<int> bits(2 * kThreads);
  RUN(cspd::launch(lanes_kernel, cspd::Grid{1, kThreads}, nullptr, in.get(), shuffled.get(), crossed.get(), votes.get(),
                   bits.get()));
  const auto got_shuffled = shuffled.host(), got_crossed = crossed.host();
  const auto got_votes = votes.host();
  const auto got_bits = bits.host();
  for (int i = 0; i < kThreads; ++i) {
    const int warp = i / 32 * 32, lane = i % 32;
    unsigned expected = 0;
    int lowest = -1, count = 0;
    for (int k = 31; k >= 0; --k) {
      if (values[warp + k] % 3 != 0) continue;
      expected |= 1u << k;
      ++count;
      if (k >= lane) lowest = k - lane;
    }
    CHECK_EQUAL(got_shuffled[i], values[warp + (lane * 7 + 3) % 32]);
    CHECK_EQUAL(got_crossed[i], values[warp + (lane ^ 5)]);
    CHECK_EQUAL(got_votes[i], expected);
    CHECK_EQUAL(got_bits[2 * i], lowest);
    CHECK_EQUAL(got_bits[2 * i + 1], count);
  }
}

// c [16, 8] += a [16, 16] b [16, 8]; every lane picks its own values out of plain matrices.
template <typename T>
__global__ void tile_kernel(const T* a, const T* b, float* c) {
  const int g = cspd::lane() / 4, q = cspd::lane() % 4;
  const auto pair = [](T low, T high) { return low.bits | static_cast<std::uint32_t>(high.bits) << 16; };
  const auto of_a = [&](int row, int k) { return pair(a[16 * row + k], a[16 * row + k + 1]); };
  const auto of_b = [&](int k, int column) { return pair(b[8 * k + column], b[8 * (k + 1) + column]); };
  float* const places[4] = {&c[8 * g + 2 * q], &c[8 * g + 2 * q + 1], &c[8 * (g + 8) + 2 * q],
                            &c[8 * (g + 8) + 2 * q + 1]};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = *places[i];
  const std::uint32_t left[4] = {of_a(g, 2 * q), of_a(g + 8, 2 * q), of_a(g, 2 * q + 8), of_a(g + 8, 2 * q + 8)};
  const std::uint32_t right[2] = {of_b(2 * q, g), of_b(2 * q + 8, g)};
  cspd::multiply_tile<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) *places[i] = sums[i];
}

template <typename T>
void tiles() {
  Random random(1);
  for (int repetition = 0; repetition < 20; ++repetition) {
    const bool whole = repetition < 10;  // exact, whatever the order of the sum
    const auto draw = [&] { return static_cast<float>(whole ? random.integer(-8, 8) : random.normal()); };
    std::vector<T> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8);
    for (auto& value : a) value = cspd::from_float<T>(draw());
    for (auto& value : b) value = cspd::from_float<T>(draw());
    for (auto& value : c) value = draw();
    const Array<T> left(a), right(b);
    const Array<float> sums(c);
    RUN(cspd::launch(tile_kernel<T>, cspd::Grid{1, 32}, nullptr, left.get(), right.get(), sums.get()));
    const auto got = sums.host();
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double expected = c[8 * row + column];
        for (int k = 0; k < 16; ++k) {
          expected += static_cast<double>(cspd::to_float(a[16 * row + k])) * cspd::to_float(b[8 * k + column]);
        }
        CHECK_NEAR_SCALE(got[8 * row + column], expected, whole ? 0 : 1e-5, 1);
      }
    }
  }
}

// Each lane gives the rows of the matrices in an order of its own.
__global__ void matrices_kernel(const std::uint16_t* values, std::uint32_t* pairs) {
  auto* shared = cspd::shared_memory<std::uint16_t>();  // [32, 8]
  const int lane = cspd::lane();
  for (int k = 0; k < 8; ++k) shared[8 * lane + k] = values[8 * lane + k];
  cspd::sync_warp();
  std::uint32_t of_lane[4];
  cspd::load_matrices(of_lane, shared + 8 * (lane * 11 % 32));
  for (int i = 0; i < 4; ++i) pairs[4 * lane + i] = of_lane[i];
}

void matrices() {
  std::vector<std::uint16_t> values(32 * 8);
  for (int i = 0; i < 32 * 8; ++i) values[i] = static_cast<std::uint16_t>(i * 257);
  const Array<std::uint16_t> in(values);
  const Array<std::uint32_t> out(4 * 32);
  RUN(cspd::launch(matrices_kernel, cspd::Grid{1, 32, 32 * 8 * 2}, nullptr, in.get(), out.get()));
  const auto got = out.host();
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = (8 * i + lane / 4) * 11 % 32, at = 8 * row + 2 * (lane % 4);
      CHECK_EQUAL(got[4 * lane + i], values[at] | static_cast<std::uint32_t>(values[at + 1]) << 16);
    }
  }
}

__global__ void early_kernel(const float* weights, float* values, bool all_wait) {
  const auto i = blockIdx.x * blockDim.x + threadIdx.x;
  const float weight = weights[i];
  if (!all_wait && i == 70) return;
  cspd::wait_for_earlier();
  values[i] += weight;
}

// Early kernels one after another, each adding to what the one before has left.
void early() {
  constexpr int kCount = 64 * 40, kLaunches = 20;
  const Array<float> weights(std::vector<float>(kCount, 1.0f)), values(kCount);
  const std::vector<float> start(kCount, 0.5f);
  const cspd::Grid grid{40, 64, 0, false, true};
  const auto launch = [&] { return cspd::launch(early_kernel, grid, nullptr, weights.get(), values.get(), true); };
  device::run_early([&] { values.set(start); }, launch);
  for (int i = 1; i < kLaunches; ++i) SUCCEED(launch());
  device::synchronise();
  CHECK_SAME_BITS(values.host(), std::vector<float>(kCount, 0.5f + kLaunches));
#ifdef CSPD_EMULATED
  CHECK(cspd::launch(early_kernel, grid, nullptr, weights.get(), values.get(), false) == cudaErrorLaunchFailure);
#endif
}

// Copies that are waited for group by group; each thread uses its own only.
__global__ void copies_kernel(const float* from, float* to) {
  const auto i = threadIdx.x;
  auto* stage = cspd::shared_memory<cspd::Vector<float, 4>>();
  for (int group = 0; group < 3; ++group) {
    cspd::copy_async(&stage[3 * i + group], from + 4 * (3 * i + group), i % 5 != 0);
    cspd::copy_async_commit();
  }
  const auto keep = [&](int group) {
    for (int k = 0; k < 4; ++k) to[4 * (3 * i + group) + k] = stage[3 * i + group].v[k];
  };
  cspd::copy_async_wait<2>();
  keep(0);
  cspd::copy_async_wait<0>();
  keep(1);
  keep(2);
}

void copies() {
  constexpr int kThreads = 64, kCount = 12 * kThreads;
  std::vector<float> values(kCount), expected(kCount);
  for (int i = 0; i < kCount; ++i) {
    values[i] = static_cast<float>(i + 1);
    expected[i] = i / 12 % 5 == 0 ? 0.0f : values[i];
  }
  const Array<float> from(values), to(kCount);
  RUN(cspd::launch(copies_kernel, cspd::Grid{1, kThreads, kCount * sizeof(float)}, nullptr, from.get(), to.get()));
  CHECK_SAME_BITS(to.host(), expected);
}

__global__ void conversions_kernel(float* from_half, float* from_bfloat, float16* half, bfloat16* bfloat) {
  const auto i = blockIdx.x * blockDim.x + threadIdx.x;
  from_half[i] = cspd::to_float(float16{static_cast<std::uint16_t>(i)});
  from_bfloat[i] = cspd::to_float(bfloat16{static_cast<std::uint16_t>(i)});
  const float value = cspd::bit_cast<float>(i * 65537u);
  half[i] = cspd::from_float<float16>(value);
  bfloat[i] = cspd::from_float<bfloat16>(value);
}

void conversions() {
  constexpr int kCount = 0x10000;
  const Array<float> from_half(kCount), from_bfloat(kCount);
  const Array<float16> half(kCount);
  const Array<bfloat16> bfloat(kCount);
  RUN(cspd::launch(conversions_kernel, cspd::Grid{kCount / 256, 256}, nullptr, from_half.get(), from_bfloat.get(),
                   half.get(), bfloat.get()));
  const auto got_half = from_half.host(), got_bfloat = from_bfloat.host();
  const auto to_half = half.host();
  const auto to_bfloat = bfloat.host();
  for (std::uint32_t i = 0; i < kCount; ++i) {
    CHECK_NEAR(got_half[i], cspd::to_float(float16{static_cast<std::uint16_t>(i)}), 0);
    CHECK_NEAR(got_bfloat[i], cspd::to_float(bfloat16{static_cast<std::uint16_t>(i)}), 0);
    const float value = cspd::bit_cast<float>(i * 65537u);
    CHECK_EQUAL(to_half[i].bits, cspd::from_float<float16>(value).bits);
    CHECK_EQUAL(to_bfloat[i].bits, cspd::from_float<bfloat16>(value).bits);
  }
}

__global__ void numbers_kernel(cspd::Words* words, cspd::Normals* normals, double* mills) {
  const auto i = threadIdx.x;
  words[i] = cspd::words_at(0x123456789abcdef0, -static_cast<std::int64_t>(i), 3 * i, 5, cspd::kStreamUniform);
  normals[i] = cspd::normals_at(~std::uint64_t{0}, std::int64_t{1} << 40, i, i, cspd::kStreamProposal);
  mills[i] = cspd::mills_ratio(0.1 * i);
}

void numbers() {
  constexpr int kCount = 256;
  const Array<cspd::Words> words(kCount);
  const Array<cspd::Normals> normals(kCount);
  const Array<double> mills(kCount);
  RUN(cspd::launch(numbers_kernel, cspd::Grid{1, kCount}, nullptr, words.get(), normals.get(), mills.get()));
  const auto got_words = words.host();
  const auto got_normals = normals.host();
  const auto got_mills = mills.host();
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const auto four = cspd::words_at(0x123456789abcdef0, -static_cast<std::int64_t>(i), 3 * i, 5, cspd::kStreamUniform);
    const auto drawn = cspd::normals_at(~std::uint64_t{0}, std::int64_t{1} << 40, i, i, cspd::kStreamProposal);
    for (int k = 0; k < 4; ++k) {
      CHECK_EQUAL(got_words[i].v[k], four.v[k]);
      CHECK_NEAR_SCALE(got_normals[i].v[k], drawn.v[k], 2e-6, 1 + std::fabs(drawn.v[k]));
    }
    CHECK_NEAR(got_mills[i], cspd::mills_ratio(0.1 * i), 1e-14);
  }
}

void launches() {
  const Array<float> in(32), out(32);
  const auto kernel = sums_kernel<1, float>;
  CHECK(cspd::launch(kernel, cspd::Grid{0, 32}, nullptr, in.get(), out.get()) == cudaSuccess);
  CHECK(cspd::launch(kernel, cspd::Grid{std::int64_t{1} << 31, 32}, nullptr, in.get(), out.get()) ==
        cudaErrorInvalidConfiguration);
  CHECK(cspd::launch(kernel, cspd::Grid{1, 2048}, nullptr, in.get(), out.get()) != cudaSuccess);
  device::synchronise();
  CHECK(out.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("device", argc, argv, [] {
    sums<1, float>();
    sums<2, float>();
    sums<4, float>();
    sums<8, double>();
    sums<16, float>();
    sums<32, double>();
    lanes();
    tiles<float16>();
    tiles<bfloat16>();
    matrices();
    early();
    copies();
    conversions();
    numbers();
    launches();
  });
}
