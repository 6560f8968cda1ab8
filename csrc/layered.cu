#include "cspd/layered.cuh"

#include <type_traits>

#include "cspd/types.cuh"

namespace cspd {
namespace {

constexpr int kFewTokens = 256;  // up to here every token has a block of the update to itself

bool covered(int width) { return width > 0 && width <= kMaxWidth && width % 16 == 0; }

// ``use`` with the modulation of type T and a null pointer of the operand's type.
template <typename T, typename Use>
cudaError_t with_operand(const AnyModulation& any, int width, const Use& use) {
  const Modulation<T> modulation = {any.gain, any.offset, static_cast<const T*>(any.mods),
                                    any.gain ? 3 * width : 2 * width, any.epsilon};
  return any.gain ? use(modulation, static_cast<T*>(nullptr)) : use(modulation, static_cast<float*>(nullptr));
}

Grid elements(std::int64_t chunks) { return {(chunks + kElementThreads - 1) / kElementThreads, kElementThreads}; }

}  // namespace

cudaError_t condition(Operand type, const void* y, const float* time_embedding, void* out, int steps, int rows,
                      int width, cudaStream_t stream) {
  if (!covered(width)) return cudaErrorInvalidValue;
  const std::int64_t chunks = static_cast<std::int64_t>(steps) * rows * width / 4;
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return launch(condition_kernel<T>, elements(chunks), stream, static_cast<const T*>(y), time_embedding,
                  static_cast<T*>(out), rows, width, chunks);
  });
}

cudaError_t bias_silu(Operand type, void* value, const void* bias, std::int64_t rows, int width, cudaStream_t stream) {
  if (!covered(width)) return cudaErrorInvalidValue;
  const std::int64_t chunks = rows * width / 4;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch(bias_silu_kernel<T>, elements(chunks), stream, static_cast<T*>(value), static_cast<const T*>(bias),
                  width, chunks);
  });
}

cudaError_t input(Operand type, const float* x, const float* weight, const float* bias, float* h,
                  const AnyModulation& any, void* operand, std::int64_t tokens, int halves, int channels, int width,
                  cudaStream_t stream) {
  if (!covered(width)) return cudaErrorInvalidValue;
  const Grid grid{tokens, kRowThreads, 2 * kRowWarps * sizeof(float)};
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_operand<T>(any, width, [&](const auto& modulation, auto* none) {
      using Out = std::remove_pointer_t<decltype(none)>;
      return launch(input_kernel<T, Out>, grid, stream, x, weight, bias, h, modulation, static_cast<Out*>(operand),
                    tokens, halves, channels, width);
    });
  });
}

cudaError_t residual(Operand type, const void* product, const void* bias, const void* mods, float* h,
                     const AnyModulation& next, void* operand, std::int64_t rows, int width, cudaStream_t stream) {
  if (!covered(width)) return cudaErrorInvalidValue;
  const Grid grid{rows, kRowThreads, 2 * kRowWarps * sizeof(float)};
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_operand<T>(next, width, [&](const auto& modulation, auto* none) {
      using Out = std::remove_pointer_t<decltype(none)>;
      return launch(residual_kernel<T, Out>, grid, stream, static_cast<const T*>(product), static_cast<const T*>(bias),
                    static_cast<const T*>(mods), h, modulation, static_cast<Out*>(operand), width);
    });
  });
}

cudaError_t update(const Update& update, cudaStream_t stream) {
  if (!covered(update.width)) return cudaErrorInvalidValue;
  const auto grid = [&](int tokens) {
    return Grid{(update.tokens + tokens - 1) / tokens, kRowThreads, tokens * update.channels * sizeof(float)};
  };
  // Many tokens share a block's reading of the weights.
  return update.tokens <= kFewTokens ? launch(update_kernel<1>, grid(1), stream, update)
                                     : launch(update_kernel<4>, grid(4), stream, update);
}

}  // namespace cspd
