#include "cspd/randn.cuh"

#include "cspd/types.cuh"

namespace cspd {

cudaError_t randn(Operand type, Operand first, const Randn& draw, void* out, cudaStream_t stream) {
  if (draw.calls < 0 || draw.numel < 0 || draw.grid < 1 || draw.rounds < 1) return cudaErrorInvalidValue;
  if (draw.numel == 0) return cudaSuccess;
  const Grid grid{static_cast<std::int64_t>(draw.calls) * draw.rounds * draw.grid, kRandnThreads};
  return with_type(type, [&](auto zero) {
    return with_type(first, [&](auto first_zero) {
      using T = decltype(zero);
      return launch(randn_kernel<T, decltype(first_zero)>, grid, stream, draw, static_cast<T*>(out));
    });
  });
}

}  // namespace cspd
