#include "cspd/sweep.cuh"

namespace cspd {

cudaError_t sweep(const Sweep& sweep, cudaStream_t stream) {
  const std::int64_t groups = (sweep.channels + kSweepChannels - 1) / kSweepChannels;
  const Grid grid{sweep.tokens * groups, kSweepThreads, sizeof(SweepMemory), false, true};
  return launch(sweep_kernel, grid, stream, sweep);
}

cudaError_t settle(const Settle& settle, cudaStream_t stream) {
  const Grid grid{1, kSettleThreads, kSettleThreads * sizeof(int), false, true};
  return launch(settle_kernel, grid, stream, settle);
}

}  // namespace cspd
