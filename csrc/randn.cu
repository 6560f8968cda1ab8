#include "cspd/randn.cuh"

namespace cspd {

cudaError_t randn(Operand type, Operand first, const Randn& draw, void* out, cudaStream_t stream) {
  if (draw.calls < 0 || draw.numel < 0 || draw.grid < 1 || draw.rounds < 1) return cudaErrorInvalidValue;
  if (draw.numel == 0) return cudaSuccess;
  const Grid grid{static_cast<std::int64_t>(draw.calls) * draw.rounds * draw.grid, kRandnThreads};
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch(randn_kernel<T>, grid, stream, draw, first, static_cast<T*>(out));
  });
}

}  // namespace cspd
