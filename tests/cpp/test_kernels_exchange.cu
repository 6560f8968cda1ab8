// Words that the blocks of one launch pass to each other, written many times and read by all.
#include <algorithm>

#include "cspd/exchange.cuh"
#include "device.h"

namespace {

using device::Array;

constexpr int kThreads = 64, kModulus = 1009;
constexpr std::uint64_t kTimeout = 20'000'000'000;

__device__ int next_value(int sum, int block) { return (sum * 3 + 7 * block + 1) % kModulus; }

// Rounds go to two places in turn: who writes a place again has since read the other from everybody, who wrote that
// after having read this.
__device__ int place_of(int round) { return round % 2; }
__device__ unsigned bit_of(int round) { return (round + 1) / 2 & 1; }

__device__ float await_one(const std::uint32_t* word, unsigned bit, cspd::Watchdog& watchdog) {
  const std::uint32_t* const words[] = {word};
  float values[1];
  cspd::await(words, values, bit, watchdog);
  return values[0];
}

// Every round each block passes on one word, all threads of all blocks read all words, and the next value follows from
// the sum. ``words`` [2, blocks]; ``out`` [blocks, threads]: the last sums.
__global__ void relay_kernel(std::uint32_t* words, std::int32_t* error, int rounds, int silent, int* out) {
  cspd::Watchdog watchdog(error, kTimeout / (silent < 0 ? 1 : 10000));
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  int sum = block;
  for (int round = 1; round <= rounds; ++round) {
    std::uint32_t* row = words + place_of(round) * blocks;
    if (threadIdx.x == 0 && block != silent) {
      cspd::pass_on(row + block, static_cast<float>(next_value(sum, block)), bit_of(round));
    }
    sum = 0;
    for (int k = 0; k < blocks; ++k) sum += static_cast<int>(rintf(await_one(row + k, bit_of(round), watchdog)));
    cspd::sync_block();  // the block passes on nothing before all its threads have read
  }
  out[block * kThreads + threadIdx.x] = sum;
}

// The same with whole rows: ``words`` [2, rows, width], of which every block writes its share. ``rows`` of kRows.
constexpr int kRows = 4;

__global__ void rows_kernel(std::uint32_t* words, std::int32_t* error, int rows, int width, int rounds, int* out) {
  cspd::Watchdog watchdog(error, kTimeout);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  int sum = block;
  for (int round = 1; round <= rounds; ++round) {
    std::uint32_t* place = words + place_of(round) * rows * width;
    for (int i = block + blocks * static_cast<int>(threadIdx.x); i < rows * width; i += blocks * cspd::kRowThreads) {
      cspd::pass_on(place + i, static_cast<float>(next_value(sum, i)), bit_of(round));
    }
    const auto group = cspd::await_rows<kRows, 2>(place, rows, width, bit_of(round), watchdog);
    float mine = 0.0f;
    for (const auto& row : group.v) {
      for (const auto& chunk : row) {
        for (const float value : chunk.v) mine += rintf(value);
      }
    }
    float* scratch = cspd::shared_memory<float>();
    mine = cspd::sum_over<32>(mine);
    if (cspd::lane() == 0) scratch[cspd::warp()] = mine;
    cspd::sync_block();
    sum = 0;
    for (int w = 0; w < cspd::kRowWarps; ++w) sum += static_cast<int>(scratch[w]);
    sum %= kModulus;
    cspd::sync_block();
  }
  out[block * cspd::kRowThreads + threadIdx.x] = sum;
}

void check_sums(const std::vector<int>& got, int expected) {
  CHECK_EQUAL(std::count(got.begin(), got.end(), expected), static_cast<std::ptrdiff_t>(got.size()));
}

int rounds() { return device::small ? 20 : device::kEmulated ? 200 : 20000; }

void single_words(int blocks) {
  const auto out = device::in_any_order([&] {
    const Array<std::uint32_t> words(std::vector<std::uint32_t>(2 * blocks, 0));
    const Array<std::int32_t> error({0});
    const Array<int> out(blocks * kThreads);
    RUN(cspd::launch(relay_kernel, cspd::Grid{blocks, kThreads, 0, true}, nullptr, words.get(), error.get(), rounds(),
                     -1, out.get()));
    CHECK_EQUAL(error.host()[0], 0);
    return out.host();
  });
  std::vector<int> sums(blocks);
  for (int k = 0; k < blocks; ++k) sums[k] = k;
  for (int round = 0; round < rounds(); ++round) {
    int sum = 0;
    for (int k = 0; k < blocks; ++k) sum += (sums[k] * 3 + 7 * k + 1) % kModulus;
    std::fill(sums.begin(), sums.end(), sum);
  }
  check_sums(out, sums[0]);
}

void rows(int blocks, int count, int width) {
  const int words_of_all = count * width, rounds_of_rows = rounds() / 8;
  const auto out = device::in_any_order([&] {
    const Array<std::uint32_t> words(std::vector<std::uint32_t>(2 * words_of_all, 0));
    const Array<std::int32_t> error({0});
    const Array<int> out(blocks * cspd::kRowThreads);
    const cspd::Grid grid{blocks, cspd::kRowThreads, cspd::kRowWarps * sizeof(float), true};
    RUN(cspd::launch(rows_kernel, grid, nullptr, words.get(), error.get(), count, width, rounds_of_rows, out.get()));
    CHECK_EQUAL(error.host()[0], 0);
    return out.host();
  });
  std::vector<int> sums(blocks);
  for (int k = 0; k < blocks; ++k) sums[k] = k;
  for (int round = 0; round < rounds_of_rows; ++round) {
    int sum = 0;
    for (int i = 0; i < words_of_all; ++i) sum += (sums[i % blocks] * 3 + 7 * i + 1) % kModulus;
    std::fill(sums.begin(), sums.end(), sum % kModulus);
  }
  check_sums(out, sums[0]);
}

void a_silent_block() {
  constexpr int kBlocks = 3;
  const Array<std::uint32_t> words(std::vector<std::uint32_t>(2 * kBlocks, 0));
  const Array<std::int32_t> error({0});
  const Array<int> out(kBlocks * kThreads);
  RUN(cspd::launch(relay_kernel, cspd::Grid{kBlocks, kThreads, 0, true}, nullptr, words.get(), error.get(), 5, 1,
                   out.get()));
  CHECK_EQUAL(error.host()[0], 1);
}

// Waits that are longer than the timeout together, each of them shorter.
__global__ void waits_kernel(std::int32_t* error, std::uint64_t timeout) {
  cspd::Watchdog watchdog(error, timeout);
  for (int wait = 0; wait < 8; ++wait) {
    watchdog.start();
    const std::uint64_t begin = cspd::nanoseconds();
    while (cspd::nanoseconds() - begin < timeout / 4 && watchdog.patient()) continue;
  }
}

void many_short_waits() {
  const Array<std::int32_t> error({0});
  RUN(cspd::launch(waits_kernel, cspd::Grid{1, 1}, nullptr, error.get(), std::uint64_t{100'000'000}));
  CHECK_EQUAL(error.host()[0], 0);
}

__global__ void bits_kernel(const float* values, std::uint32_t* words, float* back, std::int32_t* error) {
  cspd::Watchdog watchdog(error, kTimeout);
  const auto i = threadIdx.x;
  for (unsigned bit = 0; bit < 2; ++bit) {
    cspd::pass_on(words + i, values[i], bit);
    back[2 * i + bit] = await_one(words + i, bit, watchdog);
  }
}

// A value changes by one unit in the last place at most, and the bit is there.
void values_and_bits() {
  const std::vector<float> values = {0.0f, 1.0f, -1.0f, 0.1f, -3.7e-5f, 1.5e30f, 3.4028235e38f, 1e-40f};
  const Array<float> in(values), back(2 * values.size());
  const Array<std::uint32_t> words(values.size());
  const Array<std::int32_t> error({0});
  RUN(cspd::launch(bits_kernel, cspd::Grid{1, static_cast<int>(values.size())}, nullptr, in.get(), words.get(),
                   back.get(), error.get()));
  const auto got = back.host();
  for (std::size_t i = 0; i < got.size(); ++i) {
    const auto bits = cspd::bit_cast<std::uint32_t>(got[i]);
    CHECK_EQUAL(bits & 1, i % 2);
    CHECK_EQUAL(bits >> 1, cspd::bit_cast<std::uint32_t>(values[i / 2]) >> 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("exchange", argc, argv, [] {
    for (const int blocks : {1, 2, 7, device::kEmulated ? 16 : 64}) single_words(blocks);
    rows(1, 1, 16);
    rows(5, 3, 64);
    rows(3, 4, 272);
    rows(8, 2, 2048);
    values_and_bits();
    a_silent_block();
    many_short_waits();
  });
}
