// The products of a network block with what follows them, in every tile.
#include "layers.h"

namespace {

using cspd::bfloat16;
using cspd::float16;
using device::Array;

struct Tile {
  int rows, columns;
};
constexpr Tile kTiles[] = {{16, 16}, {32, 32}, {64, 32}, {64, 64}};

// activations = silu(operand weight^T + bias), or h += gate (operand weight^T + bias).
template <typename T>
std::vector<float> product(int width, int rows, const Tile& tile, bool residual) {
  const check::In in(check::text(rows) + " rows of width " + check::text(width) + " by tiles of " +
                     check::text(tile.rows) + " x " + check::text(tile.columns) + (residual ? ", residual" : ""));
  const auto count = static_cast<std::size_t>(rows) * width;
  // Every tensor from numbers of its own: the first rows' are the same among more.
  const Tensor<T> operand(Random(1).normals(count)), bias(Random(2).normals(width)), mods(Random(3).normals(3 * count)),
      weight(Random(4).normals(static_cast<std::size_t>(width) * width, 1.0 / std::sqrt(width)));
  const Tensor<float> h(Random(5).normals(count, 1.0, 2.0));
  const Array<T> activations(count);
  const cspd::Product arguments = {operand.get(),
                                   weight.get(),
                                   bias.get(),
                                   residual ? nullptr : activations.get(),
                                   residual ? mods.get() : nullptr,
                                   residual ? h.array.get() : nullptr,
                                   {mods.get(), mods.get(), 3 * width},
                                   rows,
                                   width};
  const auto launch = [&] { return cspd::product(Type<T>::kOperand, arguments, tile.rows, tile.columns, nullptr); };
  if (rows == 0) {
    RUN(launch());
    return {};
  }
  run_early(launch, operand, mods, h);
  const auto sums = linear(operand.values, weight.values, bias.values);
  Doubles expected;
  for (std::size_t i = 0; i < count; ++i) {
    const double gate = mods.values[(3 * (i / width) + 2) * width + i % width];
    expected.push_back(residual ? h.values[i] + gate * sums[i] : silu(sums[i]));
  }
  if (residual) {
    CHECK_ALL_NEAR(h.array.host(), expected, 2e-6);
    return h.array.host();
  }
  const auto got = doubles(activations.host());
  CHECK_ALL_NEAR(got, expected, Type<T>::kRounding);
  return {got.begin(), got.end()};
}

// The same bits by every tile, and for a row alone.
template <typename T>
void every_size() {
  const check::In type(Type<T>::kName);
  for (const bool residual : {false, true}) {
    for (const auto& tile : kTiles) product<T>(48, 0, tile, residual);
    for (const int width : {16, 48, 272, 304}) {
      for (const int rows : {1, 16, 35, 70}) {
        if (device::small && (width > 48 || rows == 16)) continue;
        const auto first = product<T>(width, rows, kTiles[0], residual);
        for (const auto& tile : {kTiles[1], kTiles[2], kTiles[3]}) {
          CHECK_SAME_BITS(product<T>(width, rows, tile, residual), first);
        }
        auto among_others = first;
        among_others.resize(width);
        CHECK_SAME_BITS(among_others, product<T>(width, 1, kTiles[0], residual));
      }
    }
  }
}

// More spans of a warp than its ring has stages.
template <typename T>
void wide() {
  for (const auto& tile : kTiles) {
    for (const int width : {1040, 2048}) product<T>(width, width == 2048 ? 2 : 18, tile, width == 2048);
  }
}

template <typename T>
void any_order() {
  for (const auto& tile : kTiles) {
    device::in_any_order([&] { return product<T>(tile.rows == 64 ? 816 : 1584, 3, tile, true); }, 3);
    device::in_any_order([&] { return product<T>(112, 35, tile, false); });
  }
}

void what_there_is_not() {
  const Array<float> memory(4096);
  float* at = memory.get();
  const cspd::Product product = {at, at, at, at, nullptr, nullptr, {}, 1, 16};
  const auto half = cspd::Operand::kFloat16;
  CHECK(cspd::product(cspd::Operand::kFloat32, product, 16, 16, nullptr) == cudaErrorInvalidValue);
  for (const auto& tile : {Tile{16, 32}, Tile{32, 16}, Tile{0, 0}, Tile{64, 16}}) {
    CHECK(cspd::product(half, product, tile.rows, tile.columns, nullptr) == cudaErrorInvalidValue);
  }
  device::synchronise();
  CHECK(memory.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("product", argc, argv, [] {
    every_size<float16>();
    every_size<bfloat16>();
    if (!device::small) wide<bfloat16>();
    any_order<float16>();
    what_there_is_not();
  });
}
