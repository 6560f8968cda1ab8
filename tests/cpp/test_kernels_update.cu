// The end of a reverse step: final layer, guidance, limits, the update rule, noise.
#include "layers.h"

namespace {

using device::Array;

struct Case {
  int tokens, channels, width, step, groups;
  bool learned, addressed, clipped = false, deterministic = false;
};

std::vector<float> update(const Case& c) {
  const check::In in(check::text(c.tokens) + " tokens of " + check::text(c.channels) + " channels, width " +
                     check::text(c.width) + ", step " + check::text(c.step) + ", " + check::text(c.groups) + " groups" +
                     (c.clipped ? ", clipped" : "") + (c.deterministic ? ", deterministic" : "") +
                     (c.learned ? ", learned" : "") + (c.addressed ? ", addressed" : ""));
  // Every tensor from numbers of its own: the first tokens' are the same in a larger batch.
  int seed_of_tensor = 0;
  const auto normals = [&seed_of_tensor](std::size_t count, double scale = 1.0, double mean = 0.0) {
    return Random(++seed_of_tensor).normals(count, scale, mean);
  };
  const int rows = c.groups * c.tokens, outputs = c.learned ? 2 * c.channels : c.channels;
  const auto count = static_cast<std::size_t>(c.tokens) * c.channels;
  const Tensor<float> operand(normals(static_cast<std::size_t>(rows) * c.width)),
      weight(normals(outputs * c.width, 1.0 / std::sqrt(c.width))), bias(normals(outputs)), temperature({0.9f}),
      scale(normals((c.groups - 1) * c.tokens, 1.0, 2.0)), x(normals(count)), noise(normals(count)),
      path(normals(count));
  std::vector<std::int64_t> rows_of_noise;
  for (int token = 0; token < c.tokens; ++token) rows_of_noise.push_back(5 * token + (std::int64_t{1} << 35));
  const Array<std::int64_t> seed({-77}), addresses(rows_of_noise);
  const auto coefficients = table_of(c.step, c.deterministic);
  const Array<cspd::StepTable> table({coefficients});
  const auto limits = c.clipped ? clip_of(c.channels) : std::vector<float>{};
  const Array<float> clip(limits);
  const Array<float> log_std(count);
  cspd::Update arguments = {operand.get(),
                            {nullptr, nullptr, weight.get(), bias.get()},
                            table.get(),
                            temperature.get(),
                            c.groups > 1 ? scale.get() : nullptr,
                            c.clipped ? clip.get() : nullptr,
                            x.array.get(),
                            {c.addressed ? nullptr : noise.get(), 0, seed.get(), addresses.get()},
                            log_std.get(),
                            path.array.get(),
                            c.tokens,
                            c.step,
                            c.groups,
                            c.channels,
                            c.width,
                            c.learned};
  const auto launch = [&] { return cspd::update(arguments, nullptr); };
  if (c.tokens == 0) {
    RUN(launch());
  } else {
    run_early(launch, operand, temperature, scale, x, noise, path);
  }

  const auto network = linear(operand.values, weight.values, bias.values);
  Doubles expected_x, expected_log_std, expected_path = path.values;
  for (int token = 0; token < c.tokens; ++token) {
    for (int channel = 0; channel < c.channels; ++channel) {
      const std::size_t at = static_cast<std::size_t>(token) * c.channels + channel;
      Doubles of_groups, scales;
      for (int g = 0; g < c.groups; ++g) {
        of_groups.push_back(network[(g * c.tokens + token) * outputs + channel]);
        if (g > 0) scales.push_back(scale.values[(g - 1) * c.tokens + token]);
      }
      const double v = c.learned ? network[token * outputs + c.channels + channel] : 0.0;
      const double drawn = c.addressed ? cspd::normal_at(static_cast<std::uint64_t>(-77), rows_of_noise[token], c.step,
                                                         channel, cspd::kStreamStep)
                                       : noise.values[at];
      const auto step = plain_step(x.values[at], plain_guided(of_groups, scales), v, coefficients, c.learned,
                                   limits_of(limits, channel), temperature.values[0], drawn, c.step == 0);
      expected_x.push_back(step.x);
      expected_log_std.push_back(step.log_std);
      if (c.step > 0) expected_path[at] += step.log_std;
    }
  }
  const auto got = x.array.host();
  CHECK_ALL_NEAR(got, expected_x, 1e-5);
  CHECK_ALL_NEAR(path.array.host(), expected_path, 1e-5);
  if (c.step == 0) {
    CHECK_ALL_NEAR(log_std.host(), expected_log_std, 1e-5);
  } else {
    CHECK(log_std.untouched());
  }
  return got;
}

// Tiles of other sizes serve larger batches.
void a_token_is_the_same_in_every_batch() {
  for (const bool addressed : {false, true}) {
    const auto alone = update({3, 9, 272, 1, 1, true, addressed});
    for (const int tokens : {33, 131}) {
      auto among_others = update({tokens, 9, 272, 1, 1, true, addressed});
      among_others.resize(alone.size());
      CHECK_SAME_BITS(among_others, alone);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("update", argc, argv, [] {
    // A warp has one token and channel, from 33 tokens on two by two, and from 129 on four by four.
    for (const int tokens : {0, 1, 5, 32, 33, 128, 129, 131, 300}) {
      if (device::small && tokens > 5 && tokens != 33 && tokens != 131) continue;
      for (int flags = 0; flags < 16; ++flags) {
        update({tokens, 3, 48, flags & 8 ? 2 : 0, flags & 1 ? 2 : 1, (flags & 2) != 0, (flags & 4) != 0});
      }
    }
    for (const int width : {16, 48, 1040, 2048, 4096}) {
      for (const int tokens : {2, 34, width > 1000 ? 130 : 259}) {
        if (width < 4096 || tokens == 2) update({tokens, 16, width, 1, 2, true, true});
      }
    }
    for (const int channels : {1, 8, 9, 64, 256}) {
      for (const int tokens : {3, 35, 135}) {
        if (channels < 256 || tokens == 35) update({tokens, channels, 32, 3, 2, true, true});
      }
    }
    // Limits and steps without noise in every tile; three groups have two of their own.
    for (const int tokens : {1, 33, 131}) {
      for (int flags = 0; flags < 16; ++flags) {
        const int step = flags & 4 ? 2 : 0;
        update({tokens, 3, 48, step, 3, (flags & 1) != 0, (flags & 2) != 0, (flags & 8) != 0});
      }
      for (const int groups : {1, 2, 3}) {
        update({tokens, 5, 32, 2, groups, true, true, true});
        update({tokens, 5, 32, 2, groups, false, false, false, true});
        update({tokens, 5, 32, 0, groups, false, true, true, true});
      }
    }
    for (const int tokens : {3, 36, 258}) {
      device::in_any_order([&] { return update({tokens, 20, 48, 1, tokens == 36 ? 3 : 2, true, true, true}); });
    }
    a_token_is_the_same_in_every_batch();
  });
}
