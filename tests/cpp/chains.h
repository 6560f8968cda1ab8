// A whole chain in plain double loops, and the arguments of the persistent kernel for the same one.
#pragma once

#include <memory>

#include "layers.h"

constexpr float kChainEpsilon = 0.1f;  // large enough to show

// Which chain.
struct Size {
  int tokens, channels, width, depth, steps;
  bool guided = false, learned = true, addressed = false, clipped = false, deterministic = false, shared = false;

  int groups() const { return guided ? 2 : 1; }
  int rows() const { return tokens * groups(); }
  int outputs() const { return learned ? 2 * channels : channels; }
  std::string text() const {
    return check::text(tokens) + " tokens of " + check::text(channels) + " channels, width " + check::text(width) +
           ", depth " + check::text(depth) + ", " + check::text(steps) + " steps" + (guided ? ", guided" : "") +
           (learned ? ", learned" : "") + (addressed ? ", addressed" : "") + (clipped ? ", clipped" : "") +
           (deterministic ? ", deterministic" : "") + (shared ? ", shared" : "");
  }
};

template <typename T>
struct Block {
  Tensor<float> norm_weight, norm_bias;
  Tensor<T> weight0, bias0, weight1, bias1;

  Block(Random& random, int width)
      : norm_weight(random.normals(width, 0.2, 1.0)),
        norm_bias(random.normals(width, 0.3)),
        weight0(random.normals(static_cast<std::size_t>(width) * width, 1.0 / std::sqrt(width))),
        bias0(random.normals(width, 0.5)),
        weight1(random.normals(static_cast<std::size_t>(width) * width, 1.5 / std::sqrt(width))),
        bias1(random.normals(width, 0.5)) {}

  cspd::BlockWeights get() const {
    return {norm_weight.get(), norm_bias.get(), weight0.get(), bias0.get(), weight1.get(), bias1.get()};
  }
};

// Everything that a chain reads.
template <typename T>
struct Inputs {
  Size size;
  Random random;
  std::vector<std::unique_ptr<Block<T>>> network;
  Tensor<T> mods, final_mods;  // [D, T, M, 3 W], [T, M, 2 W]
  Tensor<float> input_weight, input_bias, final_weight, final_bias, temperature, scale, x, noise;
  std::vector<std::int64_t> rows_of_noise;
  std::vector<cspd::StepTable> tables;
  std::vector<float> limits;
  device::Array<float> clip;

  explicit Inputs(const Size& size)
      : size(size),
        random(size.width + size.tokens),
        mods(random.normals(static_cast<std::size_t>(size.depth) * size.steps * size.rows() * 3 * size.width, 0.5)),
        final_mods(random.normals(static_cast<std::size_t>(size.steps) * size.rows() * 2 * size.width, 0.5)),
        input_weight(random.normals(size.width * size.channels)),
        input_bias(random.normals(size.width)),
        final_weight(random.normals(size.outputs() * size.width, 1.0 / std::sqrt(size.width))),
        final_bias(random.normals(size.outputs(), 0.5)),
        temperature({0.9f}),
        scale(random.normals(size.tokens, 0.5, 2.0)),
        x(random.normals(size.tokens * size.channels)),
        noise(random.normals(size.steps * (size.tokens * size.channels + 3))),
        limits(size.clipped ? clip_of(size.channels) : std::vector<float>{}),
        clip(limits) {
    for (int i = 0; i < size.depth; ++i) network.push_back(std::make_unique<Block<T>>(random, size.width));
    for (int i = 0; i < size.tokens; ++i) rows_of_noise.push_back(3 * i + (std::int64_t{1} << 34));
    for (int i = 0; i < size.steps; ++i) tables.push_back(table_of(i, size.deterministic));
  }

  std::int64_t noise_stride() const { return size.tokens * size.channels + 3; }
  std::int64_t mods_block() const { return size.shared ? 0 : std::int64_t{3} * size.steps * size.rows() * size.width; }
};

struct Results {
  Doubles x, log_std, path;
};

// The outputs of the network for x [N, C]. Values are rounded to T where products take them.
template <typename T>
Doubles plain_network(const Inputs<T>& in, const Doubles& x, int step) {
  const Size& size = in.size;
  const int width = size.width, rows = size.rows();
  auto h = linear(x, in.input_weight.values, in.input_bias.values);
  if (size.guided) h.insert(h.end(), h.begin(), h.begin() + size.tokens * width);
  const auto operand = [&](const Doubles& gain, const Doubles& offset, const double* mods, int stride) {
    Doubles all;
    for (int row = 0; row < rows; ++row) {
      const auto one = modulated(h.data() + row * width, width, gain, offset, mods + row * stride, kChainEpsilon);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  };
  for (int i = 0; i < size.depth; ++i) {
    const auto& block = *in.network[i];
    const double* mods = in.mods.values.data() + i * in.mods_block() + std::int64_t{3} * step * rows * width;
    auto a = operand(block.norm_weight.values, block.norm_bias.values, mods, 3 * width);
    for (auto& value : a) value = rounded<T>(value);
    a = linear(a, block.weight0.values, block.bias0.values);
    for (auto& value : a) value = rounded<T>(silu(value));
    a = linear(a, block.weight1.values, block.bias1.values);
    for (int k = 0; k < rows * width; ++k) h[k] += mods[(k / width * 3 + 2) * width + k % width] * a[k];
  }
  return linear(operand({}, {}, in.final_mods.values.data() + std::int64_t{2} * step * rows * width, 2 * width),
                in.final_weight.values, in.final_bias.values);
}

template <typename T>
Results plain_chain(const Inputs<T>& in) {
  const Size& size = in.size;
  const Doubles none(size.tokens * size.channels);
  Results results = {in.x.values, none, none};
  for (int step = size.steps - 1; step >= 0; --step) {
    const auto out = plain_network(in, results.x, step);
    for (int i = 0; i < size.tokens * size.channels; ++i) {
      const int token = i / size.channels, channel = i % size.channels;
      Doubles of_groups = {out[token * size.outputs() + channel]};
      const double v = size.learned ? out[token * size.outputs() + size.channels + channel] : 0.0;
      if (size.guided) of_groups.push_back(out[(size.tokens + token) * size.outputs() + channel]);
      const double noise = size.addressed
                               ? cspd::normal_at(99, in.rows_of_noise[token], step, channel, cspd::kStreamStep)
                               : in.noise.values[step * in.noise_stride() + i];
      const auto after =
          plain_step(results.x[i], plain_guided(of_groups, {in.scale.values[token]}), v, in.tables[step], size.learned,
                     limits_of(in.limits, channel), in.temperature.values[0], noise, step == 0);
      results.x[i] = after.x;
      results.log_std[i] = after.log_std;
      if (step > 0) results.path[i] += after.log_std;
    }
  }
  return results;
}

// The persistent kernel's arguments and results on the device.
template <typename T>
class ChainOnDevice {
 public:
  ChainOnDevice(const Inputs<T>& in, const cspd::PersistentPlan& plan)
      : in_(in),
        plan_(plan),
        blocks_(in.size.depth),
        tables_(in.tables),
        seed_({99}),
        addresses_(in.rows_of_noise),
        x_(in.x.typed),
        log_std_(in.x.typed.size()),
        path_(std::vector<float>(in.x.typed.size(), 0.0f)),
        exchange_(plan.exchange_words),
        error_({0}) {
    std::vector<cspd::BlockWeights> addresses;
    for (const auto& block : in.network) addresses.push_back(block->get());
    blocks_.set(addresses);
  }

  // The steps stop - 1 .. start, with modulations from those of ``first`` on.
  cspd::Persistent arguments(int first, int start, int stop) const {
    const Size& size = in_.size;
    const std::int64_t row = std::int64_t{first} * size.rows() * size.width;
    return {blocks_.get(),
            in_.mods.get() + 3 * row,
            in_.mods_block(),
            in_.final_mods.get() + 2 * row,
            {in_.input_weight.get(), in_.input_bias.get(), in_.final_weight.get(), in_.final_bias.get()},
            tables_.get(),
            in_.temperature.get(),
            size.guided ? in_.scale.get() : nullptr,
            size.clipped ? in_.clip.get() : nullptr,
            x_.get(),
            {size.addressed ? nullptr : in_.noise.get(), in_.noise_stride(), seed_.get(), addresses_.get()},
            log_std_.get(),
            path_.get(),
            exchange_.get(),
            error_.get(),
            size.tokens,
            size.groups(),
            size.channels,
            size.depth,
            size.width,
            size.learned,
            kChainEpsilon,
            first,
            start,
            stop,
            20'000'000'000,
            -1};
  }

  cudaError_t launch(const cspd::Persistent& arguments) const {
    return cspd::persistent(Type<T>::kOperand, arguments, plan_, nullptr);
  }

  Results results() const { return {doubles(x_.host()), doubles(log_std_.host()), doubles(path_.host())}; }
  int error() const { return error_.host()[0]; }
  bool has_log_std() const { return !log_std_.untouched(); }
  bool untouched() const { return !has_log_std() && exchange_.untouched() && x_.host() == in_.x.typed; }

 private:
  const Inputs<T>& in_;
  cspd::PersistentPlan plan_;
  device::Array<cspd::BlockWeights> blocks_;
  device::Array<cspd::StepTable> tables_;
  device::Array<std::int64_t> seed_, addresses_;
  device::Array<float> x_, log_std_, path_;
  device::Array<std::uint32_t> exchange_;
  device::Array<std::int32_t> error_;
};
