#include "cspd/verdict.cuh"

#include <type_traits>

#include "cspd/types.cuh"

namespace cspd {
namespace {

// Whether every matrix of a call can be read and written 16 bytes at a time.
template <typename... Pointers>
bool aligned(int channels, Pointers... pointers) {
  return channels % 4 == 0 && ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

bool aligned(const Judged& judged) {
  return aligned(judged.channels, judged.x, judged.draft.mean, judged.draft.log_std, judged.target.mean,
                 judged.target.log_std);
}

// Whether each candidate has a chain of its own, or a part of one.
bool of_each(const Candidates::Rows& rows) { return rows.mean > 1 || rows.log_std > 1 || rows.path > 1; }

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ``use`` with the lanes and quads of a token of so many channels.
template <typename Use>
cudaError_t with_layout(int channels, const Use& use) {
  const auto layout = [&](auto lanes, auto quads) { return use(lanes, quads); };
  if (channels < 0 || channels > 256) return cudaErrorInvalidValue;
  if (channels <= 4) return layout(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
  if (channels <= 8) return layout(std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
  if (channels <= 16) return layout(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
  if (channels <= 32) return layout(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
  if (channels <= 64) return layout(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{});
  if (channels <= 128) return layout(std::integral_constant<int, 32>{}, std::integral_constant<int, 1>{});
  return layout(std::integral_constant<int, 32>{}, std::integral_constant<int, 2>{});
}

constexpr int kWarps = kVerdictThreads / kWarp;

}  // namespace

cudaError_t log_density_ratio(const Judged& given, float* out, cudaStream_t stream) {
  Judged judged = given;
  judged.aligned = aligned(judged);
  return with_layout(judged.channels, [&](auto lanes, auto quads) {
    constexpr int kLanes = decltype(lanes)::value, kQuads = decltype(quads)::value;
    const Grid grid{divided_up(judged.tokens, kWarps * (kWarp / kLanes)), kVerdictThreads};
    return judged.aligned ? launch(log_density_ratio_kernel<kLanes, kQuads, true>, grid, stream, judged, out)
                          : launch(log_density_ratio_kernel<kLanes, kQuads, false>, grid, stream, judged, out);
  });
}

cudaError_t accept_reject(const Judged& given_judged, const Redraw& given_redraw, const Candidates& given_candidates,
                          bool closed_form, int multiprocessors, cudaStream_t stream) {
  Judged judged = given_judged;
  Redraw redraw = given_redraw;
  Candidates candidates = given_candidates;
  judged.aligned = aligned(judged) && aligned(judged.channels, redraw.sample, redraw.token);
  candidates.chains = of_each(candidates.draft) || of_each(candidates.target);
  if (candidates.count < 1 || (candidates.count > 1 && !candidates.accepted)) return cudaErrorInvalidValue;
  return with_layout(judged.channels, [&](auto lanes, auto quads) {
    constexpr int kLanes = decltype(lanes)::value, kQuads = decltype(quads)::value;
    // A few tokens are spread over the device: a rejected one then waits for no other's redraw.
    const std::int64_t room = static_cast<std::int64_t>(multiprocessors) * kWarps;
    const auto wanted = divided_up(judged.tokens, room > 0 ? room : 1);
    redraw.tokens_per_warp = static_cast<int>(wanted < kWarp / kLanes ? (wanted > 0 ? wanted : 1) : kWarp / kLanes);
    const Grid grid{divided_up(judged.tokens, kWarps * redraw.tokens_per_warp), kVerdictThreads};
    const auto with_method = [&](auto many) {
      constexpr bool kMany = decltype(many)::value;
      return closed_form
                 ? launch(accept_reject_kernel<kLanes, kQuads, true, kMany>, grid, stream, judged, redraw, candidates)
                 : launch(accept_reject_kernel<kLanes, kQuads, false, kMany>, grid, stream, judged, redraw, candidates);
    };
    return candidates.accepted ? with_method(std::true_type{}) : with_method(std::false_type{});
  });
}

}  // namespace cspd
