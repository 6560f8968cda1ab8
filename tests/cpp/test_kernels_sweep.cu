// Sweeps over all steps: the network's output, the recursion, which tokens have settled. And kernels that are to leave
// everything as it is.
#include "layers.h"

namespace {

using device::Array;

struct Case {
  int steps, tokens, channels, groups;
  bool learned, addressed;
  float temperature = 0.9f;
  bool clipped = false, deterministic = false;
};

std::string text(const Case& c) {
  return check::text(c.steps) + " steps of " + check::text(c.tokens) + " tokens of " + check::text(c.channels) +
         " channels, " + check::text(c.groups) + " groups" + (c.learned ? ", learned" : "") +
         (c.addressed ? ", addressed" : "") + (c.clipped ? ", clipped" : "") +
         (c.deterministic ? ", deterministic" : "");
}

std::vector<cspd::StepTable> tables_of(int steps, bool deterministic) {
  std::vector<cspd::StepTable> tables;
  for (int step = 0; step < steps; ++step) {
    tables.push_back(table_of(step % 12, deterministic));  // the coefficients stay those of a chain that is stable
  }
  return tables;
}

// The definition, in double: of one token and channel at a time.
struct Plain {
  Doubles x, before, x0, mean, log_std, path, change, size;
};

double slope(double moved_x0, double moved_x) {
  const double secant = moved_x0 / moved_x;
  return moved_x != 0.0 && secant > 0.0 ? std::min(secant, 1.0) : 0.0;
}

class Sweeps {
 public:
  explicit Sweeps(const Case& c)
      : c_(c),
        count_(static_cast<std::size_t>(c.tokens) * c.channels),
        whole_(count_ * c.steps),
        tables_(tables_of(c.steps, c.deterministic)),
        table_array_(tables_),
        start_(Random(1).normals(count_)),
        noise_(Random(2).normals(whole_)),
        scale_(Random(3).normals((c.groups - 1) * c.tokens, 0.5, 2.0)),
        temperature_({c.temperature}),
        limits_(c.clipped ? clip_of(c.channels) : std::vector<float>{}),
        clip_(limits_),
        seed_({-77}),
        addresses_(rows_of_noise()),
        x_(whole_),
        before_(whole_),
        x0_(c.groups * whole_),
        mean_(count_),
        log_std_(count_),
        path_(count_),
        change_(count_),
        size_(count_),
        settled_(std::vector<std::int32_t>(c.tokens, 0)),
        done_({0}),
        live_({1}),
        out_(c.groups * whole_),
        v_(whole_) {
    plain_.x.resize(whole_);
    plain_.before = Doubles(whole_);
    plain_.x0 = Doubles(c.groups * whole_);
    plain_.mean = plain_.log_std = plain_.path = plain_.change = plain_.size = Doubles(count_);
  }

  // The launch; what it reads is not there before the kernels before it have ended.
  void run(bool begin, bool guessed = false) {
    const cspd::Sweep arguments = {
        out_.get(),
        c_.learned ? v_.get() : nullptr,
        start_.get(),
        scale_.get(),
        temperature_.get(),
        c_.clipped ? clip_.get() : nullptr,
        {c_.addressed ? nullptr : noise_.get(), static_cast<std::int64_t>(count_), seed_.get(), addresses_.get()},
        table_array_.get(),
        x_.get(),
        before_.get(),
        x0_.get(),
        mean_.get(),
        log_std_.get(),
        path_.get(),
        change_.get(),
        size_.get(),
        settled_.get(),
        done_.get(),
        live_.get(),
        c_.tokens,
        c_.steps,
        c_.groups,
        c_.channels,
        begin,
        guessed};
    const auto x = x_.host(), out = out_.host();
    if (!begin) {
      x_.poison();
      out_.poison();
    }
    device::run_early(
        [&] {
          x_.set(x);
          out_.set(out);
        },
        [&] { return cspd::sweep(arguments, nullptr); });
  }

  // Outputs of a network that no one needs to know, but that depends on x somehow.
  void evaluate(int sweep) {
    const auto x = x_.host();
    std::vector<float> out(c_.groups * whole_), v(whole_);
    const auto shift = Random(100 + sweep).normals(whole_, 0.1);
    for (std::size_t i = 0; i < whole_; ++i) {
      out[i] = 0.4f * std::sin(x[i]) + shift[i];
      if (c_.groups > 1) out[whole_ + i] = 0.3f * std::cos(x[i]) - shift[i];
      if (c_.groups > 2) out[2 * whole_ + i] = 0.2f * std::sin(2 * x[i]) - shift[i];
      v[i] = 0.8f * std::tanh(x[i]);
    }
    out_.set(out);
    v_.set(v);
  }

  // What a sweep of the definition makes of the values on the device, ``sweeps`` of which have been done.
  void expect(bool begin, int sweeps, const std::vector<std::int32_t>& settled) {
    const Doubles x = doubles(x_.host()), before = doubles(before_.host()), x0s = doubles(x0_.host()),
                  out = doubles(out_.host()), v = doubles(v_.host()), mean_before = doubles(mean_.host());
    for (int token = 0; token < c_.tokens; ++token) {
      if (!begin && settled[token]) continue;
      for (int channel = 0; channel < c_.channels; ++channel) {
        const std::size_t own = static_cast<std::size_t>(token) * c_.channels + channel;
        double now = start_.values[own], mean = 0.0, path = 0.0, change = 0.0, size = 0.0;
        for (int step = c_.steps - 1; step >= 0; --step) {
          const std::size_t at = step * count_ + own;
          const auto& table = tables_[step];
          double input = 0.0, x0 = 0.0, s = 0.0, log_std = table.log_std_lower;
          if (!begin) {
            input = x[at];
            const double moved = sweeps == 0 ? 0.0 : input - before[at];
            plain_.before[at] = input;
            Doubles x0_of, slope_of, scales;
            for (int g = 0; g < c_.groups; ++g) {
              const std::size_t of_group = g * whole_ + at;
              x0_of.push_back(table.x0_x * input + table.x0_out * out[of_group]);
              slope_of.push_back(sweeps == 0 ? 0.0 : slope(x0_of[g] - x0s[of_group], moved));
              plain_.x0[of_group] = x0_of[g];
              if (g > 0) scales.push_back(scale_.values[(g - 1) * c_.tokens + token]);
            }
            const double free = plain_guided(x0_of, scales);
            x0 = limits_of(limits_, channel).of(free);
            s = x0 == free ? plain_guided(slope_of, scales) : 0.0;
            limited_ += x0 != free;
            log_std = plain_log_std(v[at], table, c_.learned);
          }
          plain_.x[at] = now;
          change = std::max(change, std::abs(now - input));
          size = std::max(size, std::abs(now));
          mean = table.mean_x0 * (x0 + s * (now - input)) + table.mean_x * now;
          if (step == 0) {
            if (!begin) plain_.log_std[own] = log_std;
            continue;
          }
          path += log_std;
          const double z = c_.addressed ? cspd::normal_at(static_cast<std::uint64_t>(-77), rows_of_noise()[token], step,
                                                          channel, cspd::kStreamStep)
                                        : noise_.values[at];
          now = mean + temperature_.values[0] * std::exp(log_std) * z;
        }
        plain_.mean[own] = mean;
        if (begin) continue;
        plain_.path[own] = path;
        plain_.change[own] = std::max(change, std::abs(mean - mean_before[own]));
        plain_.size[own] = std::max(size, std::abs(mean));
      }
    }
  }

  void check_all(bool begin) const {
    CHECK_ALL_NEAR(x_.host(), plain_.x, kBound);
    CHECK_ALL_NEAR(mean_.host(), plain_.mean, kBound);
    if (begin) {
      CHECK(before_.untouched() && x0_.untouched() && change_.untouched() && path_.untouched());
      return;
    }
    CHECK_ALL_NEAR(before_.host(), plain_.before, kBound);
    CHECK_ALL_NEAR(x0_.host(), plain_.x0, kBound);
    CHECK_ALL_NEAR(log_std_.host(), plain_.log_std, kBound);
    CHECK_ALL_NEAR(path_.host(), plain_.path, kBound);
    CHECK_ALL_NEAR(change_.host(), plain_.change, kBound);
    CHECK_ALL_NEAR(size_.host(), plain_.size, kBound);
  }

  std::vector<float> state() const {
    std::vector<float> all;
    for (const auto* array : {&x_, &before_, &x0_, &mean_, &log_std_, &path_, &change_, &size_}) {
      const auto values = array->host();
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }

  void set_settled(const std::vector<std::int32_t>& settled) const { settled_.set(settled); }
  void set_done(int done) const { done_.set({done}); }
  void set_live(int live) const { live_.set({live}); }
  void set_x(const std::vector<float>& x) const { x_.set(x); }
  std::vector<float> x() const { return x_.host(); }
  std::vector<float> start() const { return start_.typed; }
  std::vector<float> mean() const { return mean_.host(); }
  std::size_t whole() const { return whole_; }
  int limited() const { return limited_; }  // how often the definition's x0 was

 private:
  static constexpr double kBound = 2e-5;

  std::vector<std::int64_t> rows_of_noise() const {
    std::vector<std::int64_t> rows;
    for (int token = 0; token < c_.tokens; ++token) rows.push_back(5 * token + (std::int64_t{1} << 35));
    return rows;
  }

  Case c_;
  std::size_t count_, whole_;
  std::vector<cspd::StepTable> tables_;
  Array<cspd::StepTable> table_array_;
  Tensor<float> start_, noise_, scale_, temperature_;
  std::vector<float> limits_;
  Array<float> clip_;
  Array<std::int64_t> seed_, addresses_;
  Array<float> x_, before_, x0_, mean_, log_std_, path_, change_, size_;
  Array<std::int32_t> settled_, done_, live_;
  Array<float> out_, v_;
  Plain plain_;
  int limited_ = 0;
};

// The first inputs, then three sweeps, one token settled from the second on.
std::vector<float> sweeps(const Case& c) {
  const check::In in(text(c));
  Sweeps of(c);
  std::vector<std::int32_t> settled(c.tokens, 0);
  of.expect(true, 0, settled);
  of.run(true);
  of.check_all(true);
  for (int sweep = 0; sweep < 3; ++sweep) {
    of.evaluate(sweep);
    if (sweep == 2 && c.tokens > 1) settled[1] = 1;
    of.set_settled(settled);
    of.set_done(sweep);
    of.expect(false, sweep, settled);
    of.run(false);
    of.check_all(false);
  }
  CHECK((of.limited() > 0) == c.clipped);
  const auto before = of.state();
  of.evaluate(3);
  of.set_live(0);
  of.run(false);
  CHECK_SAME_BITS(of.state(), before);
  return before;
}

void a_guess_is_kept_but_for_its_first_input() {
  const Case c = {7, 3, 5, 2, true, false};
  const check::In in("a guess");
  Sweeps of(c);
  auto guess = Random(9).normals(of.whole());
  of.set_x(guess);
  of.run(true, true);
  const auto start = of.start();
  std::copy(start.begin(), start.end(), guess.end() - static_cast<std::ptrdiff_t>(start.size()));
  CHECK_SAME_BITS(of.x(), guess);
  for (const float mean : of.mean()) CHECK(mean == INFINITY);
}

struct Settled {
  std::vector<std::int32_t> settled, sweeps;
  int done, live, left;
};

// Of tokens with two channels, whose changes are given and whose size is 2; tolerance 0.25, so up to 0.5.
Settled settle(const std::vector<float>& changes, std::vector<std::int32_t> settled, int done, int live, int steps,
               int limit, int count, bool begin, float size = 2.0f) {
  const auto tokens = static_cast<int>(changes.size());
  std::vector<float> of_channels, sizes;
  for (const float change : changes) {
    of_channels.insert(of_channels.end(), {0.0f, change});
    sizes.insert(sizes.end(), {size, 1.0f});
  }
  const Array<float> change(of_channels), size_array(sizes), tolerance({0.25f});
  const Array<std::int32_t> counts({count}), settled_array(settled), sweeps(std::vector<std::int32_t>(tokens, 7)),
      done_array({done}), live_array({live}), left({5});
  const cspd::Settle arguments = {change.get(),
                                  size_array.get(),
                                  tolerance.get(),
                                  counts.get(),
                                  settled_array.get(),
                                  sweeps.get(),
                                  done_array.get(),
                                  live_array.get(),
                                  left.get(),
                                  tokens,
                                  steps,
                                  2,
                                  limit,
                                  begin};
  change.poison();
  device::run_early([&] { change.set(of_channels); }, [&] { return cspd::settle(arguments, nullptr); });
  return {settled_array.host(), sweeps.host(), done_array.host()[0], live_array.host()[0], left.host()[0]};
}

void settling() {
  const auto same = [](const Settled& got, const Settled& wanted) {
    CHECK_SAME_BITS(got.settled, wanted.settled);
    CHECK_SAME_BITS(got.sweeps, wanted.sweeps);
    CHECK(got.done == wanted.done && got.live == wanted.live && got.left == wanted.left);
  };
  const float nan = NAN, inf = INFINITY;
  same(settle({0, 0, 0}, {-1, -1, -1}, 9, 9, 10, 10, 2, true), {{0, 0, 1}, {0, 0, 0}, 0, 1, 1});
  same(settle({0, 0}, {-1, -1}, 9, 9, 10, 10, 0, true), {{1, 1}, {0, 0}, 0, 0, 0});
  // A first sweep settles nothing but a chain of one step.
  same(settle({0, 0.4f}, {0, 0}, 0, 1, 10, 10, 2, false), {{0, 0}, {1, 1}, 1, 1, 1});
  same(settle({9, inf}, {0, 0}, 0, 1, 1, 1, 2, false), {{1, 1}, {1, 1}, 1, 0, 0});
  same(settle({0.5f, 0.6f, nan, inf, 9}, {0, 0, 0, 0, 1}, 3, 1, 10, 10, 5, false),
       {{1, 0, 0, 0, 1}, {4, 4, 4, 4, 7}, 4, 1, 1});
  // The last one that there may be; after as many as steps whatever is finite has settled.
  same(settle({0.6f}, {0}, 8, 1, 10, 9, 1, false), {{0}, {9}, 9, 0, 1});
  same(settle({0.6f, nan}, {0, 0}, 9, 1, 10, 10, 2, false), {{1, 1}, {10, 10}, 10, 0, 0});
  for (const float size : {nan, inf}) {
    same(settle({0.1f, inf}, {0, 0}, 9, 1, 10, 10, 2, false, size), {{0, 0}, {10, 10}, 10, 0, 1});
  }
  same(settle({0}, {0}, 4, 0, 10, 10, 1, false), {{0}, {7}, 4, 0, 5});  // not live
  // More tokens than threads.
  std::vector<float> changes(600, 0.1f);
  changes[555] = 3.0f;
  const auto many = settle(changes, std::vector<std::int32_t>(600, 0), 2, 1, 10, 10, 600, false);
  CHECK(many.left == 1 && many.settled[555] == 0 && many.settled[599] == 1);
  changes[555] = 0.1f;
  CHECK(settle(changes, std::vector<std::int32_t>(600, 0), 2, 1, 10, 10, 600, false).left == 0);
}

// Rows of ``period`` tokens at a time, group after group.
void outputs(int steps, int period, int channels, int width, int groups, bool learned) {
  const check::In in(check::text(steps) + " steps of " + check::text(period) + " tokens' outputs of " +
                     check::text(channels) + " channels, " + check::text(groups) + " groups" +
                     (learned ? ", learned" : ""));
  const int tokens = steps * period, columns = learned ? 2 * channels : channels;
  const auto count = static_cast<std::size_t>(tokens) * channels;
  const Tensor<float> operand(Random(1).normals(static_cast<std::size_t>(tokens) * groups * width)),
      weight(Random(2).normals(columns * width, 1.0 / std::sqrt(width))), bias(Random(3).normals(columns));
  const Array<float> out(groups * count), v(count);
  const Array<std::int32_t> live({1});
  const cspd::NetworkOutput arguments = {
      operand.get(), weight.get(), bias.get(), out.get(), learned ? v.get() : nullptr, tokens, period,
      groups,        channels,     width,      live.get()};
  const auto launch = [&] { return cspd::output(arguments, nullptr); };
  live.set({0});
  RUN(launch());
  CHECK(out.untouched() && v.untouched());
  live.set({1});
  run_early(launch, operand);
  const auto network = linear(operand.values, weight.values, bias.values);
  Doubles expected, of_v;
  for (int g = 0; g < groups; ++g) {
    for (int token = 0; token < tokens; ++token) {
      const std::size_t row = (token / period * groups + g) * period + token % period;
      for (int channel = 0; channel < channels; ++channel) {
        expected.push_back(network[row * columns + channel]);
        if (learned && g == 0) of_v.push_back(network[row * columns + channels + channel]);
      }
    }
  }
  CHECK_ALL_NEAR(out.host(), expected, 1e-5);
  if (learned) CHECK_ALL_NEAR(v.host(), of_v, 1e-5);
  if (!learned) CHECK(v.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("sweep", argc, argv, [] {
    // A chunk has 128 steps, a block 16 channels.
    for (const int steps : {1, 2, 5, 33, 128, 129, 300}) {
      if (device::small && steps != 5 && steps != 129) continue;
      for (int flags = 0; flags < 8; ++flags) {
        sweeps({steps, 3, 5, flags & 1 ? 2 : 1, (flags & 2) != 0, (flags & 4) != 0});
      }
    }
    for (const int channels : {1, 4, 16, 17, 35}) sweeps({9, 2, channels, 2, true, true});
    for (const int channels : {16, 19}) sweeps({140, 1, channels, 2, true, false});
    sweeps({6, 4, 3, 1, true, true, 0.0f});
    for (const int groups : {1, 2, 3}) {
      for (const int steps : {6, 131}) {
        sweeps({steps, 3, 18, groups, true, true});
        sweeps({steps, 3, 18, groups, false, false, 0.9f, true});
        if (steps == 6) sweeps({steps, 3, 5, groups, false, true, 0.9f, groups != 2, true});
      }
    }
    device::in_any_order([] { return sweeps({150, 2, 18, 3, true, true, 0.9f, true}); });
    a_guess_is_kept_but_for_its_first_input();
    settling();
    for (int flags = 0; flags < 6; ++flags) {
      for (const int period : {1, 3, 20, 70}) outputs(5, period, 5, 48, flags / 2 + 1, flags % 2 != 0);
    }
  });
}
