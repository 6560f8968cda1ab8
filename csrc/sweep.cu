#include "cspd/sweep.cuh"

#include "cspd/launch.h"

namespace cspd {

cudaError_t sweep(const Sweep& sweep, cudaStream_t stream) {
  const int steps = sweep.steps < kSweepSteps ? sweep.steps : kSweepSteps;
  const int group = sweep.channels < kSweepChannels ? sweep.channels : kSweepChannels;
  const std::int64_t groups = (sweep.channels + kSweepChannels - 1) / kSweepChannels;
  const Grid grid{sweep.tokens * groups, kSweepThreads, sweep_floats(steps, group) * sizeof(float), false, true};
  return launch(sweep_kernel, grid, stream, sweep);
}

cudaError_t settle(const Settle& settle, cudaStream_t stream) {
  const Grid grid{1, kSettleThreads, kSettleThreads / kWarp * sizeof(std::int32_t), false, true};
  return launch(settle_kernel, grid, stream, settle);
}

}  // namespace cspd
