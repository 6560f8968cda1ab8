// The normals of several calls of PyTorch's normal_() on a device, against its threads played one after the other.
#include <algorithm>

#include "cspd/launch.h"
#include "cspd/philox.cuh"
#include "device.h"
#include "random.h"

namespace {

using cspd::Operand;
using device::Array;

struct Case {
  std::int64_t numel;
  int most_blocks, calls;
  std::uint64_t seed, counter;
  bool reversed;
};

// One thread after the other as PyTorch's kernel has them: a state that moves on by a counter a round.
std::vector<double> plain_calls(const Case& c, int grid, int rounds) {
  std::vector<double> values(static_cast<std::size_t>(c.calls * c.numel));
  const std::int64_t threads = 256 * grid;
  std::uint64_t state = c.counter;
  for (int call = 0; call < c.calls; ++call) {
    double* to = values.data() + (c.reversed ? c.calls - 1 - call : call) * c.numel;
    for (int round = 0; round < rounds; ++round, ++state) {
      for (std::int64_t thread = 0; thread < threads; ++thread) {
        const auto words = cspd::philox(static_cast<std::uint32_t>(c.seed), static_cast<std::uint32_t>(c.seed >> 32),
                                        static_cast<std::uint32_t>(state), static_cast<std::uint32_t>(state >> 32),
                                        static_cast<std::uint32_t>(thread), 0);
        for (int k = 0; k < 4; ++k) {
          const std::int64_t element = thread + (4 * round + k) * threads;
          if (element >= c.numel) continue;
          const double u = cspd::uniform(words.v[k / 2 * 2]);
          const double angle = 2.0 * kPi * ((words.v[k / 2 * 2 + 1] + 0.5) * 0x1p-32);
          to[element] = std::sqrt(-2.0 * std::log(u)) * (k % 2 ? std::cos(angle) : std::sin(angle));
        }
      }
    }
  }
  return values;
}

template <typename T>
std::vector<float> run(Operand type, Operand first, const cspd::Randn& draw) {
  const Array<T> out(static_cast<std::size_t>(draw.calls * draw.numel), 1);
  RUN(cspd::randn(type, first, draw, out.get(), nullptr));
  std::vector<float> values;
  for (const T value : out.host()) values.push_back(cspd::to_float(value));
  return values;
}

std::vector<float> calls(const Case& c) {
  const check::In in(check::text(c.calls) + " calls on " + check::text(c.numel) + " values, at most " +
                     check::text(c.most_blocks) + " blocks");
  const int grid = static_cast<int>(std::min<std::int64_t>(c.most_blocks, (c.numel + 255) / 256));
  const int rounds = grid ? static_cast<int>((c.numel - 1) / (1024 * grid)) + 1 : 1;
  const cspd::Randn draw = {c.seed, c.counter, c.numel, c.calls, grid ? grid : 1, rounds, c.reversed};
  const auto single = run<float>(Operand::kFloat32, Operand::kFloat32, draw);
  CHECK_ALL_NEAR(single, plain_calls(c, grid, rounds), 2e-6);

  // Other types hold the same numbers rounded, and a first call of another type is rounded before.
  auto half = single, brain = single, first = single;
  for (auto& value : half) value = cspd::to_float(cspd::from_float<cspd::float16>(value));
  for (auto& value : brain) value = cspd::to_float(cspd::from_float<cspd::bfloat16>(value));
  const auto start = static_cast<std::size_t>(c.reversed && c.calls ? (c.calls - 1) * c.numel : 0);
  for (std::int64_t i = 0; i < (c.calls ? c.numel : 0); ++i) first[start + i] = brain[start + i];
  CHECK_SAME_BITS(run<cspd::float16>(Operand::kFloat16, Operand::kFloat16, draw), half);
  CHECK_SAME_BITS(run<cspd::bfloat16>(Operand::kBfloat16, Operand::kFloat32, draw), brain);
  CHECK_SAME_BITS(run<float>(Operand::kFloat32, Operand::kBfloat16, draw), first);
  return single;
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("randn", argc, argv, [] {
    for (const std::int64_t numel : {0, 1, 33, 255, 256, 257, 512, 513, 2048, 2049, 5000}) {
      calls({numel, 2, 3, 0xfedcba9876543210, 0xfffffffe, numel % 2 == 0});
    }
    calls({64, 1056, 100, 5, 0, true});
    calls({64, 1056, 0, 5, 0, true});
    calls({1500, 1, 2, ~std::uint64_t{0}, std::uint64_t{1} << 61, false});
    device::in_any_order([] { return calls({1300, 1, 2, 7, 9, true}); });

    // A uniform that rounds to 1, so that the radius is -0, and a positive sine: PyTorch has no negative zero.
    const auto zero = run<float>(Operand::kFloat32, Operand::kFloat32, {7, 231335, 256, 1, 1, 1, false});
    CHECK_EQUAL(zero[200], 0.0f);
    CHECK(!std::signbit(zero[200]));

    const Array<float> out(4);
    for (const cspd::Randn& wrong : {cspd::Randn{0, 0, -1, 1, 1, 1, false}, cspd::Randn{0, 0, 4, -1, 1, 1, false},
                                     cspd::Randn{0, 0, 4, 1, 0, 1, false}, cspd::Randn{0, 0, 4, 1, 1, 0, false}}) {
      CHECK(cspd::randn(Operand::kFloat32, Operand::kFloat32, wrong, out.get(), nullptr) != cudaSuccess);
    }
    CHECK(out.untouched());
  });
}
