#include "cspd/product.cuh"

#include "cspd/types.cuh"

namespace cspd {
namespace {

template <typename T, int Rows, int Columns>
cudaError_t run(const Product& product, cudaStream_t stream) {
  const std::int64_t tiles = (product.rows + Rows - 1) / Rows * ((product.width + Columns - 1) / Columns);
  const Grid grid{tiles, kProductThreads, kProductWarps * kRingBytes, false, true};
  return launch(product_kernel<T, Rows, Columns>, grid, stream, product);
}

}  // namespace

cudaError_t product(Operand type, const Product& product, int tile_rows, int tile_columns, cudaStream_t stream) {
  if (product.width <= 0 || product.width > kMaxWidth || product.width % 16 != 0) return cudaErrorInvalidValue;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (tile_rows == 16 && tile_columns == 16) return run<T, 16, 16>(product, stream);
      if (tile_rows == 32 && tile_columns == 32) return run<T, 32, 32>(product, stream);
      if (tile_rows == 64 && tile_columns == 32) return run<T, 64, 32>(product, stream);
      if (tile_rows == 64 && tile_columns == 64) return run<T, 64, 64>(product, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace cspd
