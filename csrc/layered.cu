#include "cspd/layered.cuh"

#include <type_traits>

#include "cspd/types.cuh"
#include "cspd/update.cuh"

namespace cspd {
namespace {

constexpr int kLoneTokens = 64;  // up to here every token has a block of the input to itself
constexpr int kSharing = 4;      // tokens of a block beyond

bool covered(int width) { return width > 0 && width <= kMaxWidth && width % 16 == 0; }

// ``use`` with the modulation of type T and a null pointer of the operand's type.
template <typename T, typename Use>
cudaError_t with_operand(const AnyModulation& any, int width, const Use& use) {
  const Modulation<T> modulation = {
      any.gain, any.offset, static_cast<const T*>(any.mods), any.gain ? 3 * width : 2 * width, any.epsilon, any.rms};
  return any.gain ? use(modulation, static_cast<T*>(nullptr)) : use(modulation, static_cast<float*>(nullptr));
}

Grid elements(std::int64_t chunks, bool early) {
  return {(chunks + kElementThreads - 1) / kElementThreads, kElementThreads, 0, false, early};
}

}  // namespace

cudaError_t condition(Operand type, const void* y, const float* time_embedding, void* out, int steps, int rows,
                      int width, bool own, cudaStream_t stream) {
  if (!covered(width) || (own && steps != 1)) return cudaErrorInvalidValue;
  const std::int64_t chunks = static_cast<std::int64_t>(steps) * rows * width / kOwn;
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return launch(condition_kernel<T>, elements(chunks, false), stream, static_cast<const T*>(y), time_embedding,
                  static_cast<T*>(out), rows, width, own, chunks);
  });
}

cudaError_t bias_silu(Operand type, void* value, const void* bias, const Ahead& ahead, std::int64_t rows, int hidden,
                      bool swiglu, cudaStream_t stream, const std::int32_t* live) {
  if (hidden <= 0 || hidden % 16 != 0) return cudaErrorInvalidValue;
  const std::int64_t chunks = rows * hidden / kOwn;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch(swiglu ? bias_swiglu_kernel<T> : bias_silu_kernel<T>, elements(chunks, true), stream,
                  static_cast<T*>(value), static_cast<const T*>(bias), ahead, hidden, chunks, live);
  });
}

cudaError_t input(Operand type, const float* x, const float* weight, const float* bias, float* h,
                  const AnyModulation& any, void* operand, std::int64_t tokens, int groups, int channels, int width,
                  std::int64_t period, bool early, cudaStream_t stream, const std::int32_t* live) {
  if (!covered(width)) return cudaErrorInvalidValue;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_operand<T>(any, width, [&](const auto& modulation, auto* none) {
      using Out = std::remove_pointer_t<decltype(none)>;
      const auto with_tokens = [&](auto of_block) {
        constexpr int kTokens = decltype(of_block)::value;
        const std::size_t shared = (statistics_floats(kTokens) + kTokens * channels) * sizeof(float);
        const Grid grid{(tokens + kTokens - 1) / kTokens, threads_of_row(width), shared, false, early};
        return launch(input_kernel<T, Out, kTokens>, grid, stream, x, weight, bias, h, modulation,
                      static_cast<Out*>(operand), tokens, groups, channels, width, period, live);
      };
      return tokens <= kLoneTokens || width > kSharedWidth ? with_tokens(std::integral_constant<int, 1>{})
                                                           : with_tokens(std::integral_constant<int, kSharing>{});
    });
  });
}

cudaError_t residual(Operand type, const void* product, const void* bias, const void* mods, float* h,
                     const AnyModulation& next, void* operand, std::int64_t rows, int width, cudaStream_t stream,
                     const std::int32_t* live) {
  if (!covered(width)) return cudaErrorInvalidValue;
  const Grid grid{rows, threads_of_row(width), statistics_floats(1) * sizeof(float), false, true};
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return with_operand<T>(next, width, [&](const auto& modulation, auto* none) {
      using Out = std::remove_pointer_t<decltype(none)>;
      return launch(residual_kernel<T, Out>, grid, stream, static_cast<const T*>(product), static_cast<const T*>(bias),
                    static_cast<const T*>(mods), h, modulation, static_cast<Out*>(operand), width, live);
    });
  });
}

namespace {

// ``run`` with the tokens, channels and groups of a warp, and the threads of a block.
template <typename Run>
cudaError_t with_final_tile(std::int64_t tokens, int channels, int groups, const Run& run) {
  const auto with = [&](auto of_tokens, auto of_channels, auto of_groups, auto of_threads) {
    constexpr int kTokens = decltype(of_tokens)::value, kChannels = decltype(of_channels)::value;
    constexpr int kThreads = decltype(of_threads)::value, kTiles = kThreads / kWarp;
    const std::int64_t tiles = (tokens + kTokens - 1) / kTokens * ((channels + kChannels - 1) / kChannels);
    return run(of_tokens, of_channels, of_groups, of_threads,
               Grid{(tiles + kTiles - 1) / kTiles, kThreads, 0, false, true});
  };
  using std::integral_constant;
  const integral_constant<int, 1> one;
  const integral_constant<int, 2> two;
  const integral_constant<int, 3> three;
  const integral_constant<int, 4> four;
  const integral_constant<int, 64> few_threads;
  if (groups < 1 || groups > kMostGroups) return cudaErrorInvalidValue;
  // Few tokens are spread over the device; many share what a block reads. Of three groups the sums of the largest tile
  // would take too many registers.
  if (groups == 3) return tokens <= 32 ? with(one, one, three, few_threads) : with(two, two, three, few_threads);
  if (tokens <= 32) return with(one, one, two, few_threads);
  if (tokens <= 128) return with(two, two, two, few_threads);
  return with(four, four, two, integral_constant<int, 256>{});
}

}  // namespace

cudaError_t update(const Update& update, cudaStream_t stream) {
  if (!covered(update.width)) return cudaErrorInvalidValue;
  return with_final_tile(update.tokens, update.channels, update.groups,
                         [&](auto tokens, auto channels, auto groups, auto threads, const Grid& grid) {
                           return launch(update_kernel<decltype(tokens)::value, decltype(channels)::value,
                                                       decltype(groups)::value, decltype(threads)::value>,
                                         grid, stream, update);
                         });
}

cudaError_t output(const NetworkOutput& output, cudaStream_t stream) {
  if (!covered(output.width)) return cudaErrorInvalidValue;
  return with_final_tile(output.tokens, output.channels, output.groups,
                         [&](auto tokens, auto channels, auto groups, auto threads, const Grid& grid) {
                           return launch(output_kernel<decltype(tokens)::value, decltype(channels)::value,
                                                       decltype(groups)::value, decltype(threads)::value>,
                                         grid, stream, output);
                         });
}

}  // namespace cspd
