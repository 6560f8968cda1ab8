// The persistent kernel's launches by operand type: each in a file of its own, as they take long to compile.
#pragma once

#include <type_traits>

#include "cspd/persistent.cuh"

namespace cspd {

constexpr int kMaxRows = 16;

// Rows as the kernel is compiled for.
inline int compiled_rows(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : rows <= 8 ? 8 : kMaxRows; }

template <typename T>
cudaError_t launch_chain(const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream) {
  const Grid grid{plan.blocks, kChainThreads, plan.shared_bytes, true};
  const auto with_rows = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    if constexpr (sizeof(T) == 2) {
      if (plan.resident) return launch(persistent_kernel<T, kRows, true>, grid, stream, chain, plan);
    }
    return launch(persistent_kernel<T, kRows, false>, grid, stream, chain, plan);
  };
  switch (compiled_rows(chain.tokens * chain.halves)) {
    case 2: return with_rows(std::integral_constant<int, 2>{});
    case 4: return with_rows(std::integral_constant<int, 4>{});
    case 8: return with_rows(std::integral_constant<int, 8>{});
    default: return with_rows(std::integral_constant<int, kMaxRows>{});
  }
}

// Instantiated in persistent_<type>.cu.
extern template cudaError_t launch_chain<float>(const Persistent&, const PersistentPlan&, cudaStream_t);
extern template cudaError_t launch_chain<float16>(const Persistent&, const PersistentPlan&, cudaStream_t);
extern template cudaError_t launch_chain<bfloat16>(const Persistent&, const PersistentPlan&, cudaStream_t);

}  // namespace cspd
