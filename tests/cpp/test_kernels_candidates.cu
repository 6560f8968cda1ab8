// accept_reject of several candidates a token against its definition.
#include "candidates.h"

namespace {

// The same decisions and tokens, but for the few that rounding may decide; how often each candidate was taken.
std::vector<int> check_verdicts(const Several& several, const Verdicts& got, bool closed_form) {
  const Window& first = several.each[0];
  const int count = several.count(), channels = first.channels;
  std::vector<int> taken(count + 1);
  int unclear = 0;
  for (std::int64_t i = 0; i < first.tokens; ++i) {
    const check::In in("token " + check::text(i));
    const auto expected = judge(several, i, closed_form);
    for (int k = 0; k < count; ++k) {
      CHECK_NEAR_SCALE(got.log_ratio[i * count + k], expected.ratios[k].value, 1, expected.ratios[k].error);
    }
    if (!expected.outcome.clear) {
      ++unclear;
      continue;
    }
    ++taken[expected.candidate + 1];
    CHECK_EQUAL(got.candidate[i], expected.candidate);
    CHECK_EQUAL(static_cast<int>(got.accepted[i]), static_cast<int>(expected.candidate >= 0));
    CHECK_EQUAL(got.tries[i], expected.outcome.tries);
    for (int c = 0; c < channels; ++c) {
      const double scale = std::fabs(expected.outcome.token[c]) + 10 * std::exp(first.at(i, c).log_p);
      CHECK_NEAR_SCALE(got.token[i * channels + c], expected.outcome.token[c], 2e-6, scale);
    }
  }
  CHECK(unclear <= 2 + first.tokens / 50);
  return taken;
}

std::vector<int> check_all(const Several& several, bool closed_form, int multiprocessors = 2, unsigned offsets = 0) {
  return check_verdicts(several, several.judged(closed_form, multiprocessors, offsets), closed_form);
}

void every_size() {
  for (const int channels : {0, 1, 3, 4, 8, 16, 17, 33, 64, 128, 129, 256}) {
    for (const int tokens : {0, 1, 7, device::small ? 9 : 100}) {
      for (const int count : {1, 2, 3, 16}) {
        for (const unsigned own : {0u, static_cast<unsigned>(kOwnAll & ~kOwnRelaxation)}) {
          if (tokens > 7 && count == 16 && channels > 17) continue;
          const bool closed_form = (channels + count) % 2;
          const check::In in(check::text(count) + " candidates of " + check::text(tokens) + " tokens of " +
                             check::text(channels) + " channels, own " + check::text(own));
          Several several(count, tokens, channels, own, 31 * channels + tokens);
          for (auto& window : several.each) window.released = channels % 3 == 0;
          const auto taken = check_all(several, closed_form);
          if (tokens == 100 && channels > 0) {
            for (int k = 0; k <= std::min(count, 3); ++k) CHECK(taken[k] > 0);
          }
          if (tokens == 7) check_all(several, closed_form, 132, (1 << kMatrices) - 1);
        }
      }
    }
  }
}

// Whatever the candidates share, alone or all but it.
void every_matrix_of_their_own_or_shared() {
  for (const unsigned bit : {1u, 2u, 4u, 8u, 16u, 32u, 64u, 128u}) {
    for (const unsigned own : {bit, kOwnAll & ~bit}) {
      for (const bool closed_form : {false, true}) {
        const check::In in("own " + check::text(own));
        Several several(3, 40, 5, own, bit);
        for (int k = 0; k < 3; ++k) {
          for (int i = 0; i < 40; ++i) {
            several.each[k].relaxations.push_back(0.25f * static_cast<float>(1 + i % 9 + (own & 128 ? 2 * k : 0)));
          }
          // All rows of some tokens are redrawn, or take the target's draw.
          for (int i = 0; i < 6; ++i) several.each[k].relaxations[i] = 0.0f;
          several.each[k].max_tries = 2;
        }
        check_all(several, closed_form);
      }
    }
  }
}

// Of one candidate the bits are those of the kernel for one.
void one_candidate() {
  for (const int channels : {3, 16, 132}) {
    for (const bool closed_form : {false, true}) {
      const Several several(1, 50, channels, kOwnAll & ~kOwnRelaxation, channels);
      const auto got = several.judged(closed_form, 2), plain = OnDevice(several.each[0]).accept_reject(closed_form, 2);
      CHECK_SAME_BITS(got.log_ratio, plain.log_ratio);
      CHECK_SAME_BITS(got.token, plain.token);
      CHECK_SAME_BITS(got.accepted, plain.accepted);
      CHECK_SAME_BITS(got.tries, plain.tries);
      for (int i = 0; i < 50; ++i) CHECK_EQUAL(got.candidate[i], plain.accepted[i] - 1);
    }
  }
}

// Models nearly equal and far apart, and path terms that leave nothing or almost everything.
void extremes() {
  for (const double distance : {0.0, 1e-12, 1e-6, 1e-3, 1.0, 20.0, 1e4}) {
    for (const double path : {0.0, 1e-6, -3.0, 3.0, -200.0, 200.0}) {
      const check::In in("distance " + check::text(distance) + ", path " + check::text(path));
      const bool close = distance < 1e-3 && std::fabs(path) < 1e-3;
      Several several(4, 60, 4, kOwnRelaxation, 11);
      Random random(12);
      for (auto& window : several.each) {
        // The first candidate of every other token is rejected whatever it is, where rounding does not decide on
        // others.
        for (int i = 0; i < 60; ++i) {
          window.relaxations.push_back(!close && i % 2 == 0 && &window == &several.each[0] ? 0.0f : 1.0f);
        }
        for (std::size_t i = 0; i < window.x.size(); ++i) {
          window.log_p[i] = window.log_q[i] = window.mean_q[i] = 0.0f;
          window.mean_p[i] = i % 4 == 1 ? static_cast<float>(distance) : 0.0f;
          window.x[i] = static_cast<float>(random.normal());
        }
        for (auto& value : window.path_q) value = static_cast<float>(path);
        for (auto& value : window.path_p) value = 0.0f;
      }
      for (const bool closed_form : {false, true}) {
        // By rejection no try of models that are nearly equal is far from doubt.
        if (closed_form || distance >= 1e-3) check_all(several, closed_form);
      }
    }
  }
}

// A candidate that cannot be judged is passed over; the others, and tokens beside it, are judged as ever.
void what_is_not_finite() {
  for (const bool closed_form : {false, true}) {
    for (const int channels : {3, 16}) {
      Several several(3, 64, channels, kOwnAll & ~kOwnRelaxation, 5);
      int token = 0;
      for (int k = 0; k < 3; ++k) {
        Window& window = several.each[k];
        for (auto* matrix : {&window.x, &window.mean_q, &window.log_q, &window.mean_p, &window.log_p}) {
          for (const float bad : {NAN, INFINITY, -INFINITY}) (*matrix)[token++ * channels] = bad;
        }
        for (auto* path : {&window.path_q, &window.path_p}) {
          for (const float bad : {NAN, INFINITY, -INFINITY}) (*path)[token++] = bad;
        }
      }
      for (const float relaxation : {1.0f, 1e-3f}) {
        for (auto& window : several.each) window.relaxation = relaxation;
        check_all(several, closed_form, 1);
      }
    }
  }
}

// The bits of a token depend on neither its batch nor its place in a warp, nor on how it is read or whether what
// candidates share is shared or repeated.
void batches() {
  for (const int channels : {3, 16, 132}) {
    for (const bool closed_form : {false, true}) {
      const Several several(3, 40, channels, 0, 6);
      const auto whole = several.judged(closed_form, 1);
      for (const int first : {1, 17, 38}) {
        Several part = several;
        part.own = first == 17 ? kOwnAll & ~kOwnRelaxation : 0;
        for (auto& window : part.each) {
          window.tokens = 40 - first;
          window.x.erase(window.x.begin(), window.x.begin() + first * channels);
          window.rows.erase(window.rows.begin(), window.rows.begin() + first);
          for (const auto& [bit, matrix] : Several::matrices()) {
            if (bit == kOwnRelaxation) continue;
            auto& values = window.*matrix;
            values.erase(values.begin(), values.begin() + first * (values.size() / 40));
          }
        }
        const auto got = part.judged(closed_form, 100, first == 38 ? (1 << kMatrices) - 1 : 0);
        CHECK_SAME_BITS(got.log_ratio, std::vector<float>(whole.log_ratio.begin() + 3 * first, whole.log_ratio.end()));
        CHECK_SAME_BITS(got.tries, std::vector<std::int32_t>(whole.tries.begin() + first, whole.tries.end()));
        CHECK_SAME_BITS(got.candidate,
                        std::vector<std::int32_t>(whole.candidate.begin() + first, whole.candidate.end()));
        CHECK_SAME_BITS(got.token, std::vector<float>(whole.token.begin() + first * channels, whole.token.end()));
      }
    }
  }
}

void any_order() {
  for (const bool closed_form : {false, true}) {
    const Several several(4, 50, 20, kOwnAll & ~kOwnRelaxation, 7);
    device::in_any_order([&] { return several.judged(closed_form, 3).token; });
  }
}

void counts_that_are_none() {
  const Window window(4, 3, true, 8);
  const OnDevice there(window);
  cspd::Candidates candidates;
  for (const int count : {-1, 0, 2}) {  // of two it would have to say which one
    candidates.count = count;
    CHECK(cspd::accept_reject(there.judged(), there.redraw(), candidates, false, 1, nullptr) == cudaErrorInvalidValue);
    device::synchronise();
    CHECK(there.untouched());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("candidates", argc, argv, [] {
    every_size();
    every_matrix_of_their_own_or_shared();
    one_candidate();
    extremes();
    what_is_not_finite();
    batches();
    any_order();
    counts_that_are_none();
  });
}
