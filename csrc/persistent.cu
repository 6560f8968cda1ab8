#include "cspd/persistent.cuh"

#include <type_traits>

#include "cspd/types.cuh"

namespace cspd {
namespace {

constexpr int kMaxRows = 16, kMaxChannels = 64;

// Rows as the kernel is compiled for.
int rounded_up(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

template <typename T>
PersistentPlan plan_of(int rows, int tokens, int channels, int width, int depth, int multiprocessors,
                       std::size_t shared_limit) {
  PersistentPlan plan = {};
  const int tiles = width / kTileColumns;
  plan.columns = kTileColumns * ((tiles + multiprocessors - 1) / multiprocessors);
  const auto bytes = [&](int slots) {
    return shared_layout<T>(rounded_up(rows), tokens, channels, width, depth, plan.columns, slots).bytes;
  };
  const int layer_pieces = Pieces<T>::of_layer(width, plan.columns);
  // float32 weights of the released heads do not fit anywhere.
  plan.resident = sizeof(T) == 2 && bytes(2 * depth * layer_pieces) <= shared_limit;
  int slots = 2 * depth * layer_pieces;
  if (!plan.resident) {
    const std::size_t fixed = bytes(0), slot = static_cast<std::size_t>(kChainThreads) * kPieceBytes;
    if (fixed + kStages * slot > shared_limit) return plan;
    const auto room = static_cast<int>((shared_limit - fixed) / slot / kStages);
    const int stages = (layer_pieces + room - 1) / room;  // of a layer, of about the same length
    plan.stage_pieces = (layer_pieces + stages - 1) / stages;
    slots = kStages * plan.stage_pieces;
  }
  plan.blocks = (width + plan.columns - 1) / plan.columns;
  plan.shared_bytes = bytes(slots);
  plan.exchange_words = exchange_layout(rows, channels, width).words;
  return plan;
}

// ``use`` with the number of rows that the kernel is compiled for.
template <typename Use>
cudaError_t with_rows(int rows, const Use& use) {
  switch (rounded_up(rows)) {
    case 2: return use(std::integral_constant<int, 2>{});
    case 4: return use(std::integral_constant<int, 4>{});
    case 8: return use(std::integral_constant<int, 8>{});
    default: return use(std::integral_constant<int, 16>{});
  }
}

}  // namespace

PersistentPlan persistent_plan(Operand type, int rows, int tokens, int channels, int width, int depth,
                               int multiprocessors, std::size_t shared_limit) {
  const bool covered = rows >= 1 && rows <= kMaxRows && channels >= 1 && channels <= kMaxChannels && depth >= 1 &&
                       width > 0 && width <= kMaxWidth && width % 16 == 0 && multiprocessors > 0;
  if (!covered) return {};
  if (type == Operand::kFloat32) {
    return plan_of<float>(rows, tokens, channels, width, depth, multiprocessors, shared_limit);
  }
  return plan_of<float16>(rows, tokens, channels, width, depth, multiprocessors, shared_limit);
}

cudaError_t persistent(Operand type, const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream) {
  const int rows = chain.tokens * chain.halves;
  if (plan.blocks < 1 || rows < 1 || rows > kMaxRows) return cudaErrorInvalidValue;
  const auto cleared = cudaMemsetAsync(chain.exchange, 0, plan.exchange_words * sizeof(std::uint32_t), stream);
  if (cleared != cudaSuccess) return cleared;
  const Grid grid{plan.blocks, kChainThreads, plan.shared_bytes, true};
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return with_rows(rows, [&](auto compiled_rows) {
      constexpr int kRows = decltype(compiled_rows)::value;
      if constexpr (sizeof(T) == 2) {
        if (plan.resident) return launch(persistent_kernel<T, kRows, true>, grid, stream, chain, plan);
      }
      return launch(persistent_kernel<T, kRows, false>, grid, stream, chain, plan);
    });
  });
}

}  // namespace cspd
