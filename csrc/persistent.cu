#include <type_traits>

#include "cspd/persistent_launch.cuh"
#include "cspd/types.cuh"

namespace cspd {
namespace {

constexpr int kMaxChannels = 64;

template <typename T>
PersistentPlan plan_of(int rows, int tokens, int channels, int width, int depth, int multiprocessors,
                       std::size_t shared_limit) {
  PersistentPlan plan = {};
  const int tiles = width / kTileColumns;
  plan.columns = kTileColumns * ((tiles + multiprocessors - 1) / multiprocessors);
  const auto bytes = [&](auto resident, int slots) {
    return shared_layout<T, resident.value>(compiled_rows(rows), tokens, channels, width, depth, plan.columns, slots)
        .bytes;
  };
  const int layer_pieces = Pieces<T>::of_layer(width, plan.columns);
  // Float32 weights of the released heads do not fit anywhere, nor do wide layers.
  const std::size_t all_bytes =
      bytes(std::true_type{}, resident_slots(compiled_rows(rows), depth, plan.columns, layer_pieces));
  plan.resident = sizeof(T) == 2 && width <= kNarrowWidth && all_bytes <= shared_limit;
  plan.shared_bytes = all_bytes;
  if (!plan.resident) {
    const std::size_t fixed = bytes(std::false_type{}, 0), slot = std::size_t{kChainThreads} * kPieceBytes;
    if (fixed + kStages * slot > shared_limit) return plan;
    const auto room = static_cast<int>((shared_limit - fixed) / slot / kStages);
    const int stages = (layer_pieces + room - 1) / room;  // of a layer, of about the same length
    plan.stage_pieces = (layer_pieces + stages - 1) / stages;
    plan.shared_bytes = fixed + kStages * plan.stage_pieces * slot;
  }
  plan.blocks = (width + plan.columns - 1) / plan.columns;
  plan.exchange_words = exchange_copies(compiled_rows(rows)) * exchange_layout(rows, channels, width).words;
  return plan;
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
  return with_type(type, [&](auto value) {
    const auto cleared = cudaMemsetAsync(chain.exchange, 0, plan.exchange_words * sizeof(std::uint32_t), stream);
    return cleared == cudaSuccess ? launch_chain<decltype(value)>(chain, plan, stream) : cleared;
  });
}

}  // namespace cspd
