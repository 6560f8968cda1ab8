// log_density_ratio and accept_reject against their definition.
#include <utility>

#include "verdict_launches.h"

namespace {

const std::vector<int> kChannels = {0, 1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 100, 128, 129, 132, 256};

void check_ratios(const Window& window, const std::vector<float>& got) {
  for (std::int64_t i = 0; i < window.tokens; ++i) {
    const float* x = window.x.data() + i * window.channels;
    const auto expected = plain_log_ratio(window, i, x, window.relaxation_of(i));
    CHECK_NEAR_SCALE(got[i], expected.value, 1, expected.error);
  }
}

// The same decisions and tokens, but for the few that rounding may decide.
void check_verdicts(const Window& window, const Verdicts& got, bool closed_form) {
  int unclear = 0;
  for (std::int64_t i = 0; i < window.tokens; ++i) {
    const check::In in("token " + check::text(i));
    const auto expected = judge(window, i, closed_form);
    CHECK_NEAR_SCALE(got.log_ratio[i], expected.log_ratio, 1, expected.ratio_error);
    if (!expected.clear) {
      ++unclear;
      continue;
    }
    CHECK_EQUAL(static_cast<int>(got.accepted[i]), static_cast<int>(expected.accepted));
    CHECK_EQUAL(got.tries[i], expected.tries);
    for (int c = 0; c < window.channels; ++c) {
      const double scale = std::fabs(expected.token[c]) + 10 * std::exp(window.at(i, c).log_p);
      CHECK_NEAR_SCALE(got.token[i * window.channels + c], expected.token[c], 2e-6, scale);
    }
  }
  CHECK(unclear <= 2 + window.tokens / 50);
}

void check_all(const Window& window, unsigned offsets, int multiprocessors, bool closed_form) {
  const OnDevice there(window, offsets);
  check_ratios(window, there.log_density_ratio());
  check_verdicts(window, there.accept_reject(closed_form, multiprocessors), closed_form);
}

void every_size() {
  for (const int channels : kChannels) {
    for (const int tokens : {0, 1, 7, device::small ? 33 : 300}) {
      for (const bool closed_form : {false, true}) {
        const check::In in(check::text(tokens) + " tokens of " + check::text(channels) +
                           (closed_form ? " channels, closed form" : " channels"));
        Window window(tokens, channels, closed_form, 17 * channels + tokens);
        window.released = channels % 2;
        for (std::int64_t i = 0; tokens == 7 && i < tokens; ++i) {
          window.relaxations.push_back(static_cast<float>(i - 1));  // -1 and 0 accept nothing
        }
        if (tokens == 1) window.relaxation = 42.0f;
        check_all(window, 0, 2, closed_form);
        if (tokens <= 7) check_all(window, (1 << kMatrices) - 1, 132, closed_form);
      }
    }
  }
}

// One matrix off its boundary is enough for none to be read wide.
void any_matrix_off_its_boundary() {
  for (const int channels : {4, 16, 132}) {
    const Window window(9, channels, false, 3);
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const check::In in("matrix " + check::text(matrix));
      check_all(window, 1u << matrix, 1, false);
    }
  }
}

void any_number_of_tries() {
  for (const int channels : {1, 16, 40}) {
    for (const int max_tries : {0, 1, 2, 5, 33, 1000}) {
      for (const bool closed_form : {false, true}) {
        const check::In in(check::text(max_tries) + " tries");
        Window window(30, channels, closed_form, max_tries);
        window.max_tries = max_tries;
        window.relaxation = 0.0f;                       // all are redrawn
        for (auto& path : window.path_q) path -= 1.0f;  // and a try rarely kept
        check_all(window, 0, 1, closed_form);
      }
    }
  }
}

// Of a token that cannot be judged or redrawn: the target's draw, and no token beside it is disturbed.
void what_is_not_finite() {
  for (const bool closed_form : {false, true}) {
    for (const int channels : {3, 16, 200}) {
      Window window(40, channels, closed_form, 5);
      int token = 0;
      for (auto* matrix : {&window.x, &window.mean_q, &window.log_q, &window.mean_p, &window.log_p}) {
        for (const float bad : {NAN, INFINITY, -INFINITY}) {
          (*matrix)[token * channels + token % channels] = bad;
          ++token;
        }
      }
      for (auto* path : {&window.path_q, &window.path_p}) {
        for (const float bad : {NAN, INFINITY, -INFINITY}) (*path)[token++] = bad;
      }
      // Equal models, of which no try is ever kept; and a target without variance, or with
      // so little that the distance is infinite.
      for (int c = 0; c < channels; ++c) {
        window.mean_q[token * channels + c] = window.mean_p[token * channels + c];
        window.log_q[token * channels + c] = window.log_p[token * channels + c];
        window.log_p[(token + 1) * channels + c] = -INFINITY;
        window.log_p[(token + 2) * channels + c] = window.log_q[(token + 2) * channels + c] = -600.0f;
      }
      window.path_q[token] = window.path_p[token];
      window.relaxation = 1e-3f;
      check_all(window, 0, 1, closed_form);
    }
  }
}

// Models nearly equal and far apart, draws that start far below the mean and that do not exist.
void extremes_of_the_closed_form() {
  constexpr int kChannelsHere = 4;
  const std::vector<double> starts = {-1e6, -50.0, -7.0, -3.0, 0.0, 2.0, 5.9, 6.1, 100.0};
  for (const double distance : {1e-12, 1e-8, 1e-6, 1e-3, 1.0, 20.0, 1e6}) {
    const check::In in("distance " + check::text(distance));
    constexpr int kEach = 12;
    Window window(static_cast<std::int64_t>(starts.size()) * kEach, kChannelsHere, true, 9);
    window.relaxation = 0.0f;
    for (std::size_t i = 0; i < window.x.size(); ++i) {
      window.log_p[i] = window.log_q[i] = window.mean_q[i] = window.mean_p[i] = 0.0f;
      if (i % kChannelsHere == 1) window.mean_p[i] = static_cast<float>(distance);
    }
    for (std::int64_t i = 0; i < window.tokens; ++i) {
      window.path_q[i] = static_cast<float>(-distance * (starts[i / kEach] + 0.5 * distance));
      window.path_p[i] = 0.0f;
    }
    check_all(window, 0, 1, true);
  }
}

// The bits of a token depend on neither its batch nor its place in a warp, nor on how it is read.
void batches() {
  for (const int channels : {3, 16, 100, 132}) {
    for (const bool closed_form : {false, true}) {
      const Window window(40, channels, closed_form, 6);
      const auto whole = OnDevice(window).accept_reject(closed_form, 1);
      for (const int first : {1, 17, 38}) {
        Window part(40 - first, channels, closed_form, 6);
        for (auto [to, from] : {std::pair{&part.x, &window.x},
                                {&part.mean_q, &window.mean_q},
                                {&part.log_q, &window.log_q},
                                {&part.mean_p, &window.mean_p},
                                {&part.log_p, &window.log_p},
                                {&part.sample, &window.sample}}) {
          to->assign(from->begin() + first * channels, from->end());
        }
        part.path_q.assign(window.path_q.begin() + first, window.path_q.end());
        part.path_p.assign(window.path_p.begin() + first, window.path_p.end());
        part.rows.assign(window.rows.begin() + first, window.rows.end());
        const auto got = OnDevice(part, (1 << kMatrices) - 1).accept_reject(closed_form, 100);
        CHECK_SAME_BITS(got.log_ratio, std::vector<float>(whole.log_ratio.begin() + first, whole.log_ratio.end()));
        CHECK_SAME_BITS(got.tries, std::vector<std::int32_t>(whole.tries.begin() + first, whole.tries.end()));
        CHECK_SAME_BITS(got.token, std::vector<float>(whole.token.begin() + first * channels, whole.token.end()));
      }
    }
  }
}

void any_order() {
  for (const bool closed_form : {false, true}) {
    const Window window(50, 20, closed_form, 7);
    device::in_any_order([&] { return OnDevice(window).accept_reject(closed_form, 3).token; });
  }
}

void channels_beyond_the_kernels() {
  for (const int channels : {-1, 257}) {
    Window window(4, 1, false, 8);
    window.channels = channels;
    const OnDevice there(window);
    CHECK(cspd::log_density_ratio(there.judged(), there.redraw().log_ratio, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::accept_reject(there.judged(), there.redraw(), {}, false, 1, nullptr) == cudaErrorInvalidValue);
    device::synchronise();
    CHECK(there.untouched());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("verdict", argc, argv, [] {
    every_size();
    any_matrix_off_its_boundary();
    any_number_of_tries();
    what_is_not_finite();
    extremes_of_the_closed_form();
    batches();
    any_order();
    channels_beyond_the_kernels();
  });
}
