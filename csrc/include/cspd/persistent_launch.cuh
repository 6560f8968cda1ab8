// The persistent kernel's launches by operand type, widest row and kind of weights: in several files, as they take long
// to compile.
#pragma once

#include "cspd/persistent.cuh"

namespace cspd {

constexpr int kMaxRows = 16;

// Rows as the kernel is compiled for.
inline int compiled_rows(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : rows <= 8 ? 8 : kMaxRows; }

template <typename T, int MaxWidth, bool Resident>
cudaError_t launch_with_rows(const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream) {
  const Grid grid{plan.blocks, kChainThreads, plan.shared_bytes, true};
  switch (compiled_rows(chain.tokens * chain.groups)) {
    case 2: return launch(persistent_kernel<T, 2, MaxWidth, Resident>, grid, stream, chain, plan);
    case 4: return launch(persistent_kernel<T, 4, MaxWidth, Resident>, grid, stream, chain, plan);
    case 8: return launch(persistent_kernel<T, 8, MaxWidth, Resident>, grid, stream, chain, plan);
    default: return launch(persistent_kernel<T, kMaxRows, MaxWidth, Resident>, grid, stream, chain, plan);
  }
}

// Instantiated in persistent_<type>.cu and persistent_<type>_wide.cu. Weights of wide layers do not stay, and float32
// ones nowhere.
#define CSPD_LAUNCH(type, max_width, resident)                                                                     \
  template cudaError_t cspd::launch_with_rows<type, max_width, resident>(const Persistent&, const PersistentPlan&, \
                                                                         cudaStream_t)
extern CSPD_LAUNCH(float, kMostWidth, false);
extern CSPD_LAUNCH(float16, kNarrowWidth, true);
extern CSPD_LAUNCH(float16, kNarrowWidth, false);
extern CSPD_LAUNCH(float16, kMostWidth, false);
extern CSPD_LAUNCH(bfloat16, kNarrowWidth, true);
extern CSPD_LAUNCH(bfloat16, kNarrowWidth, false);
extern CSPD_LAUNCH(bfloat16, kMostWidth, false);

template <typename T>
cudaError_t launch_chain(const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (plan.resident) return launch_with_rows<T, kNarrowWidth, true>(chain, plan, stream);
    if (compiled_width<T>(chain.width) == kNarrowWidth)
      return launch_with_rows<T, kNarrowWidth, false>(chain, plan, stream);
  }
  return launch_with_rows<T, kMostWidth, false>(chain, plan, stream);
}

}  // namespace cspd
