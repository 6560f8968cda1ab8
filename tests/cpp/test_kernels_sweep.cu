// Sweeps over all steps: the network's output, the recursion, which tokens have settled. And kernels that are to leave
// everything as it is.
#include "layers.h"

namespace {

using device::Array;

struct Case {
  int steps, tokens, channels;
  bool guided, learned, addressed;
  float temperature = 0.9f;
};

std::string text(const Case& c) {
  return check::text(c.steps) + " steps of " + check::text(c.tokens) + " tokens of " + check::text(c.channels) +
         " channels" + (c.guided ? ", guided" : "") + (c.learned ? ", learned" : "") +
         (c.addressed ? ", addressed" : "");
}

std::vector<cspd::StepTable> tables_of(int steps, bool learned) {
  std::vector<cspd::StepTable> tables;
  for (int step = 0; step < steps; ++step) {
    tables.push_back(table_of(step % 12));  // the coefficients stay those of a chain that is stable
    if (!learned) tables.back().log_std_upper = tables.back().log_std_lower;
  }
  return tables;
}

// The definition, in double: of one token and channel at a time.
struct Plain {
  Doubles x, before, x0, x0_u, mean, log_std, path, change, size;
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
        tables_(tables_of(c.steps, c.learned)),
        table_array_(tables_),
        start_(Random(1).normals(count_)),
        noise_(Random(2).normals(whole_)),
        scale_(Random(3).normals(c.tokens, 0.5, 2.0)),
        temperature_({c.temperature}),
        seed_({-77}),
        addresses_(rows_of_noise()),
        x_(whole_),
        before_(whole_),
        x0_(whole_),
        x0_u_(whole_),
        mean_(count_),
        log_std_(count_),
        path_(count_),
        change_(count_),
        size_(count_),
        settled_(std::vector<std::int32_t>(c.tokens, 0)),
        done_({0}),
        live_({1}),
        eps_(whole_),
        v_(whole_),
        eps_u_(whole_) {
    plain_.x.resize(whole_);
    plain_.before = plain_.x0 = plain_.x0_u = Doubles(whole_);
    plain_.mean = plain_.log_std = plain_.path = plain_.change = plain_.size = Doubles(count_);
  }

  // The launch; what it reads is not there before the kernels before it have ended.
  void run(bool begin, bool guessed = false) {
    const cspd::Sweep arguments = {
        eps_.get(),
        c_.learned ? v_.get() : nullptr,
        c_.guided ? eps_u_.get() : nullptr,
        start_.get(),
        scale_.get(),
        temperature_.get(),
        {c_.addressed ? nullptr : noise_.get(), static_cast<std::int64_t>(count_), seed_.get(), addresses_.get()},
        table_array_.get(),
        x_.get(),
        before_.get(),
        x0_.get(),
        x0_u_.get(),
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
        c_.channels,
        begin,
        guessed};
    const auto x = x_.host(), eps = eps_.host();
    if (!begin) {
      x_.poison();
      eps_.poison();
    }
    device::run_early(
        [&] {
          x_.set(x);
          eps_.set(eps);
        },
        [&] { return cspd::sweep(arguments, nullptr); });
  }

  // Outputs of a network that no one needs to know, but that depends on x somehow.
  void evaluate(int sweep) {
    const auto x = x_.host();
    std::vector<float> eps(whole_), v(whole_), eps_u(whole_);
    const auto shift = Random(100 + sweep).normals(whole_, 0.1);
    for (std::size_t i = 0; i < whole_; ++i) {
      eps[i] = 0.4f * std::sin(x[i]) + shift[i];
      eps_u[i] = 0.3f * std::cos(x[i]) - shift[i];
      v[i] = 0.8f * std::tanh(x[i]);
    }
    eps_.set(eps);
    eps_u_.set(eps_u);
    v_.set(v);
  }

  // What a sweep of the definition makes of the values on the device, ``sweeps`` of which have been done.
  void expect(bool begin, int sweeps, const std::vector<std::int32_t>& settled) {
    const Doubles x = doubles(x_.host()), before = doubles(before_.host()), x0s = doubles(x0_.host()),
                  x0s_u = doubles(x0_u_.host()), eps = doubles(eps_.host()), v = doubles(v_.host()),
                  eps_u = doubles(eps_u_.host()), mean_before = doubles(mean_.host());
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
            x0 = table.sqrt_recip_acp * input - table.sqrt_recipm1_acp * eps[at];
            s = sweeps == 0 ? 0.0 : slope(x0 - x0s[at], moved);
            plain_.before[at] = input;
            plain_.x0[at] = x0;
            if (c_.guided) {
              const double x0_u = table.sqrt_recip_acp * input - table.sqrt_recipm1_acp * eps_u[at];
              const double s_u = sweeps == 0 ? 0.0 : slope(x0_u - x0s_u[at], moved);
              plain_.x0_u[at] = x0_u;
              x0 = x0_u + scale_.values[token] * (x0 - x0_u);
              s = s_u + scale_.values[token] * (s - s_u);
            }
            const double f = c_.learned ? (v[at] + 1) / 2 : 1.0;
            log_std = f * table.log_std_upper + (1 - f) * table.log_std_lower;
          }
          plain_.x[at] = now;
          change = std::max(change, std::abs(now - input));
          size = std::max(size, std::abs(now));
          mean = table.coef1 * (x0 + s * (now - input)) + table.coef2 * now;
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
      CHECK(before_.untouched() && x0_.untouched() && x0_u_.untouched() && change_.untouched() && path_.untouched());
      return;
    }
    CHECK_ALL_NEAR(before_.host(), plain_.before, kBound);
    CHECK_ALL_NEAR(x0_.host(), plain_.x0, kBound);
    if (c_.guided) CHECK_ALL_NEAR(x0_u_.host(), plain_.x0_u, kBound);
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
  Array<std::int64_t> seed_, addresses_;
  Array<float> x_, before_, x0_, x0_u_, mean_, log_std_, path_, change_, size_;
  Array<std::int32_t> settled_, done_, live_;
  Array<float> eps_, v_, eps_u_;
  Plain plain_;
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
  const auto before = of.state();
  of.evaluate(3);
  of.set_live(0);
  of.run(false);
  CHECK_SAME_BITS(of.state(), before);
  return before;
}

void a_guess_is_kept_but_for_its_first_input() {
  const Case c = {7, 3, 5, true, true, false};
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

// Rows of ``period`` tokens at a time, conditional and then unconditional ones.
void outputs(int steps, int period, int channels, int width, bool guided, bool learned) {
  const check::In in(check::text(steps) + " steps of " + check::text(period) + " tokens' outputs of " +
                     check::text(channels) + " channels" + (guided ? ", guided" : "") + (learned ? ", learned" : ""));
  const int halves = guided ? 2 : 1, tokens = steps * period, columns = learned ? 2 * channels : channels;
  const auto count = static_cast<std::size_t>(tokens) * channels;
  const Tensor<float> operand(Random(1).normals(static_cast<std::size_t>(tokens) * halves * width)),
      weight(Random(2).normals(columns * width, 1.0 / std::sqrt(width))), bias(Random(3).normals(columns));
  const Array<float> eps(count), v(count), eps_u(count);
  const Array<std::int32_t> live({1});
  const cspd::NetworkOutput arguments = {operand.get(),
                                         weight.get(),
                                         bias.get(),
                                         eps.get(),
                                         learned ? v.get() : nullptr,
                                         guided ? eps_u.get() : nullptr,
                                         tokens,
                                         period,
                                         channels,
                                         width,
                                         live.get()};
  const auto launch = [&] { return cspd::output(arguments, nullptr); };
  live.set({0});
  RUN(launch());
  CHECK(eps.untouched() && v.untouched() && eps_u.untouched());
  live.set({1});
  run_early(launch, operand);
  const auto network = linear(operand.values, weight.values, bias.values);
  Doubles of_eps, of_v, of_eps_u;
  for (int token = 0; token < tokens; ++token) {
    const std::size_t row = token / period * halves * period + token % period;
    for (int channel = 0; channel < channels; ++channel) {
      of_eps.push_back(network[row * columns + channel]);
      if (learned) of_v.push_back(network[row * columns + channels + channel]);
      if (guided) of_eps_u.push_back(network[(row + period) * columns + channel]);
    }
  }
  CHECK_ALL_NEAR(eps.host(), of_eps, 1e-5);
  if (learned) CHECK_ALL_NEAR(v.host(), of_v, 1e-5);
  if (!learned) CHECK(v.untouched());
  if (guided) CHECK_ALL_NEAR(eps_u.host(), of_eps_u, 1e-5);
  if (!guided) CHECK(eps_u.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("sweep", argc, argv, [] {
    // A chunk has 128 steps, a block 16 channels.
    for (const int steps : {1, 2, 5, 33, 128, 129, 300}) {
      if (device::small && steps != 5 && steps != 129) continue;
      for (int flags = 0; flags < 8; ++flags) {
        sweeps({steps, 3, 5, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0});
      }
    }
    for (const int channels : {1, 4, 16, 17, 35}) sweeps({9, 2, channels, true, true, true});
    for (const int channels : {16, 19}) sweeps({140, 1, channels, true, true, false});
    sweeps({6, 4, 3, false, true, true, 0.0f});
    device::in_any_order([] { return sweeps({150, 2, 18, true, true, true}); });
    a_guess_is_kept_but_for_its_first_input();
    settling();
    for (int flags = 0; flags < 4; ++flags) {
      for (const int period : {1, 3, 20, 70}) outputs(5, period, 5, 48, (flags & 1) != 0, (flags & 2) != 0);
    }
  });
}
