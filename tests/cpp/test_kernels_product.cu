// The products of a network block with what follows them, in every tile.
#include "layers.h"

namespace {

using cspd::bfloat16;
using cspd::float16;
using device::Array;

struct Tile {
  int rows, columns;
};
constexpr Tile kTiles[] = {{16, 16}, {32, 32}, {64, 64}, {64, 32}};  // the last one not of swiglu layers

enum class Layer { kSilu, kSwiglu, kResidual };

// P = operand weight^T + bias: activations = silu(P), silu(P_0) P_1, or h += gate P.
template <typename T>
std::vector<float> product(int inner, int columns, int rows, const Tile& tile, Layer layer) {
  const bool residual = layer == Layer::kResidual, swiglu = layer == Layer::kSwiglu;
  const check::In in(check::text(rows) + " rows of " + check::text(inner) + " to " + check::text(columns) +
                     " by tiles of " + check::text(tile.rows) + " x " + check::text(tile.columns) +
                     (residual ? ", residual"
                      : swiglu ? ", swiglu"
                               : ""));
  const auto count = static_cast<std::size_t>(rows) * columns;
  const int made = swiglu ? 2 * columns : columns;
  // Every tensor from numbers of its own: the first rows' are the same among more.
  const Tensor<T> operand(Random(1).normals(static_cast<std::size_t>(rows) * inner)), bias(Random(2).normals(made)),
      mods(Random(3).normals(3 * count)),
      weight(Random(4).normals(static_cast<std::size_t>(made) * inner, 1.0 / std::sqrt(inner)));
  const Tensor<float> h(Random(5).normals(count, 1.0, 2.0));
  const Array<T> activations(count);
  const cspd::Product arguments = {operand.get(),
                                   weight.get(),
                                   bias.get(),
                                   residual ? nullptr : activations.get(),
                                   residual ? mods.get() : nullptr,
                                   residual ? h.array.get() : nullptr,
                                   {mods.get(), mods.get(), 3 * columns, columns},
                                   rows,
                                   inner,
                                   columns,
                                   swiglu};
  const auto launch = [&] { return cspd::product(Type<T>::kOperand, arguments, tile.rows, tile.columns, nullptr); };
  if (rows == 0) {
    RUN(launch());
    return {};
  }
  run_early(launch, operand, mods, h);
  const auto sums = linear(operand.values, weight.values, bias.values);
  Doubles expected;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t row = i / columns, column = i % columns;
    const double sum = sums[row * made + column], gate = mods.values[(3 * row + 2) * columns + column];
    expected.push_back(residual ? h.values[i] + gate * sum
                                : silu(sum) * (swiglu ? sums[row * made + columns + column] : 1));
  }
  if (residual) {
    CHECK_ALL_NEAR(h.array.host(), expected, 2e-6);
    return h.array.host();
  }
  const auto got = doubles(activations.host());
  CHECK_ALL_NEAR(got, expected, Type<T>::kRounding);
  return {got.begin(), got.end()};
}

std::vector<Tile> tiles_of(Layer layer) {
  std::vector<Tile> tiles(std::begin(kTiles), std::end(kTiles));
  if (layer == Layer::kSwiglu) tiles.pop_back();
  return tiles;
}

// The same bits by every tile, and for a row alone.
template <typename T>
void every_size() {
  const check::In type(Type<T>::kName);
  for (const auto layer : {Layer::kSilu, Layer::kSwiglu, Layer::kResidual}) {
    const auto tiles = tiles_of(layer);
    for (const auto& tile : tiles) product<T>(48, 48, 0, tile, layer);
    for (const auto& [inner, columns] :
         std::vector<std::pair<int, int>>{{16, 16}, {48, 48}, {272, 272}, {304, 304}, {48, 112}, {304, 16}}) {
      for (const int rows : {1, 16, 35, 70}) {
        if (device::small && (inner > 48 || rows == 16)) continue;
        if (inner != columns && rows != 35) continue;
        if (layer == Layer::kSwiglu && inner > 48 && rows > 16 && inner == columns) continue;
        const auto first = product<T>(inner, columns, rows, tiles[0], layer);
        for (std::size_t i = 1; i < tiles.size(); ++i) {
          CHECK_SAME_BITS(product<T>(inner, columns, rows, tiles[i], layer), first);
        }
        auto among_others = first;
        among_others.resize(columns);
        CHECK_SAME_BITS(among_others, product<T>(inner, columns, 1, tiles[0], layer));
      }
    }
  }
}

// More spans of a warp than its ring has stages.
template <typename T>
void wide() {
  for (const auto& tile : kTiles) {
    for (const int width : {1040, 2048}) {
      product<T>(width, width, width == 2048 ? 2 : 18, tile, width == 2048 ? Layer::kResidual : Layer::kSilu);
    }
  }
  for (const auto& tile : tiles_of(Layer::kSwiglu)) product<T>(1040, 80, 18, tile, Layer::kSwiglu);
  product<T>(64, 4608, 3, kTiles[2], Layer::kSwiglu);
  product<T>(4608, 64, 3, kTiles[2], Layer::kResidual);
}

template <typename T>
void any_order() {
  for (const auto& tile : kTiles) {
    const int width = tile.rows == 64 ? 816 : 1584;
    device::in_any_order([&] { return product<T>(width, width, 3, tile, Layer::kResidual); }, 3);
    device::in_any_order([&] { return product<T>(112, 112, 35, tile, Layer::kSilu); });
  }
  for (const auto& tile : tiles_of(Layer::kSwiglu)) {
    device::in_any_order([&] { return product<T>(816, 48, 3, tile, Layer::kSwiglu); }, 3);
  }
}

void what_there_is_not() {
  const Array<float> memory(4096);
  float* at = memory.get();
  const cspd::Product product = {at, at, at, at, nullptr, nullptr, {}, 1, 16, 16};
  const auto half = cspd::Operand::kFloat16;
  CHECK(cspd::product(cspd::Operand::kFloat32, product, 16, 16, nullptr) == cudaErrorInvalidValue);
  for (const auto& tile : {Tile{16, 32}, Tile{32, 16}, Tile{0, 0}, Tile{64, 16}}) {
    CHECK(cspd::product(half, product, tile.rows, tile.columns, nullptr) == cudaErrorInvalidValue);
  }
  auto swiglu = product;
  swiglu.swiglu = true;
  CHECK(cspd::product(half, swiglu, 64, 32, nullptr) == cudaErrorInvalidValue);
  for (const int size : {-16, 0, 8, 24}) {
    auto inner = product, columns = product;
    inner.inner = columns.columns = size;
    CHECK(cspd::product(half, inner, 16, 16, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::product(half, columns, 16, 16, nullptr) == cudaErrorInvalidValue);
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
