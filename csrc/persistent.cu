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
  const auto bytes = [&](int slots) {
    return shared_layout<T>(compiled_rows(rows), tokens, channels, width, depth, plan.columns, slots).bytes;
  };
  const int layer_pieces = Pieces<T>::of_layer(width, plan.columns);
  int slots = resident_slots(compiled_rows(rows), depth, plan.columns, layer_pieces);
  // Float32 weights of the released heads do not fit anywhere, nor do wide layers.
  plan.resident = sizeof(T) == 2 && width <= kNarrowWidth && bytes(slots) <= shared_limit;
  if (!plan.resident) {
    const std::size_t fixed = bytes(0), slot = std::size_t{kChainThreads} * kPieceBytes;
    if (fixed + kStages * slot > shared_limit) return plan;
    const auto room = static_cast<int>((shared_limit - fixed) / slot / kStages);
    // Stages of whole tiles, if there is room, and of about the same length in a layer.
    const int spans = Pieces<T>::spans(width), unit = room >= spans ? spans : 1;
    const int units = layer_pieces / unit, most = room / unit, stages = (units + most - 1) / most;
    plan.stage_pieces = (units + stages - 1) / stages * unit;
    slots = kStages * plan.stage_pieces;
  }
  plan.blocks = (width + plan.columns - 1) / plan.columns;
  plan.shared_bytes = bytes(slots);
  plan.exchange_words = exchange_copies(compiled_rows(rows)) * exchange_layout(rows, channels, width).words;
  return plan;
}

}  // namespace

PersistentPlan persistent_plan(Operand type, int rows, int tokens, int channels, int width, int depth,
                               int multiprocessors, std::size_t shared_limit) {
  const bool covered = rows >= 1 && rows <= kMaxRows && channels >= 1 && channels <= kMaxChannels && depth >= 1 &&
                       width > 0 && width <= kMostWidth && width % 16 == 0 && multiprocessors > 0;
  if (!covered) return {};
  if (type == Operand::kFloat32) {
    return plan_of<float>(rows, tokens, channels, width, depth, multiprocessors, shared_limit);
  }
  return plan_of<float16>(rows, tokens, channels, width, depth, multiprocessors, shared_limit);
}

cudaError_t persistent(Operand type, const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream) {
  const int rows = chain.tokens * chain.groups;
  if (chain.groups < 1 || chain.groups > 2 || plan.blocks < 1 || rows < 1 || rows > kMaxRows)
    return cudaErrorInvalidValue;
  return with_type(type, [&](auto value) {
    const auto cleared = cudaMemsetAsync(chain.exchange, 0, plan.exchange_words * sizeof(std::uint32_t), stream);
    return cleared == cudaSuccess ? launch_chain<decltype(value)>(chain, plan, stream) : cleared;
  });
}

}  // namespace cspd
