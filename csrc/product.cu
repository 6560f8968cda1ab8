#include "cspd/product.cuh"

#include "cspd/types.cuh"

namespace cspd {
namespace {

template <typename T, int Rows, int Columns, bool Swiglu>
cudaError_t run(const Product& product, cudaStream_t stream) {
  constexpr int kOut = Swiglu ? Columns / 2 : Columns;
  const std::int64_t tiles = (product.rows + Rows - 1) / Rows * ((product.columns + kOut - 1) / kOut);
  const Grid grid{tiles, kProductThreads, kProductWarps * kRingBytes, false, true};
  return launch(product_kernel<T, Rows, Columns, Swiglu>, grid, stream, product);
}

bool covered(int size) { return size > 0 && size % 16 == 0; }

}  // namespace

cudaError_t product(Operand type, const Product& product, int tile_rows, int tile_columns, cudaStream_t stream) {
  if (!covered(product.inner) || !covered(product.columns)) return cudaErrorInvalidValue;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const bool swiglu = product.swiglu;
      const auto is = [&](int rows, int columns) { return tile_rows == rows && tile_columns == columns; };
      if (is(16, 16)) return swiglu ? run<T, 16, 16, true>(product, stream) : run<T, 16, 16, false>(product, stream);
      if (is(32, 32)) return swiglu ? run<T, 32, 32, true>(product, stream) : run<T, 32, 32, false>(product, stream);
      if (is(64, 64)) return swiglu ? run<T, 64, 64, true>(product, stream) : run<T, 64, 64, false>(product, stream);
      if (is(64, 32) && !swiglu) return run<T, 64, 32, false>(product, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace cspd
