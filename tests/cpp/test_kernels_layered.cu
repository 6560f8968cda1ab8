// The kernels between two products of the layered chain: condition, bias_silu, input, residual.
#include "layers.h"

namespace {

using cspd::bfloat16;
using cspd::float16;
using device::Array;

constexpr float kEpsilon = 0.1f;  // large enough to show
const std::vector<int> kWidths = {16, 48, 1040, 2048};

template <typename T>
void condition(int width, int steps, int rows) {
  Random random(1);
  const Tensor<T> y(random.normals(rows * width));
  const Tensor<float> time(random.normals(steps * width));
  const Array<T> out(static_cast<std::size_t>(steps) * rows * width);
  RUN(cspd::condition(Type<T>::kOperand, y.get(), time.get(), out.get(), steps, rows, width, nullptr));
  Doubles expected;
  for (int i = 0; i < steps * rows * width; ++i) {
    expected.push_back(silu(time.values[i / (rows * width) * width + i % width] + y.values[i % (rows * width)]));
  }
  CHECK_ALL_NEAR(doubles(out.host()), expected, Type<T>::kRounding);
}

template <typename T>
void bias_silu(int width, int rows) {
  Random random(2);
  const Tensor<T> value(random.normals(rows * width, 2.0)), bias(random.normals(width));
  const Array<T> gates(static_cast<std::size_t>(3) * rows * width), next(static_cast<std::size_t>(2) * rows * width);
  const auto launch = [&] {
    const cspd::Ahead ahead = {gates.get(), next.get(), 2 * width};
    return cspd::bias_silu(Type<T>::kOperand, value.array.get(), bias.get(), ahead, rows, width, nullptr);
  };
  if (rows == 0) {
    RUN(launch());
  } else {
    run_early(launch, value);
  }
  Doubles expected;
  for (int i = 0; i < rows * width; ++i) expected.push_back(silu(value.values[i] + bias.values[i % width]));
  CHECK_ALL_NEAR(doubles(value.array.host()), expected, Type<T>::kRounding);
}

// What turns h into the next operand: affine, with three column blocks of modulations and an operand of type T, or
// not, with two and in float32.
template <typename T>
struct Following {
  Tensor<float> gain, offset;
  Tensor<T> mods;
  bool affine;

  Following(Random& random, int rows, int width, bool affine)
      : gain(random.normals(width, 0.3, 1.0)),
        offset(random.normals(width)),
        mods(random.normals(static_cast<std::size_t>(rows) * width * (affine ? 3 : 2), 0.5)),
        affine(affine) {}

  cspd::AnyModulation get() const {
    return {affine ? gain.get() : nullptr, affine ? offset.get() : nullptr, mods.get(), kEpsilon};
  }

  // The operand of h [rows, W].
  Doubles plain(const Doubles& h, int width) const {
    Doubles out;
    for (std::size_t row = 0; row < h.size() / width; ++row) {
      const double* own = mods.values.data() + row * width * (affine ? 3 : 2);
      const auto one = modulated(h.data() + row * width, width, affine ? gain.values : Doubles{},
                                 affine ? offset.values : Doubles{}, own, kEpsilon);
      out.insert(out.end(), one.begin(), one.end());
    }
    return out;
  }

  double rounding() const { return affine ? Type<T>::kRounding : Type<float>::kRounding; }
};

// The operand's memory, of either type.
template <typename T>
struct OperandOut {
  Array<T> typed;
  Array<float> plain;
  bool affine;

  OperandOut(std::size_t count, bool affine) : typed(affine ? count : 0), plain(affine ? 0 : count), affine(affine) {}
  void* get() const { return affine ? static_cast<void*>(typed.get()) : plain.get(); }
  Doubles host() const { return affine ? doubles(typed.host()) : doubles(plain.host()); }
};

// Of a matrix [rows, columns].
Doubles transposed(const Doubles& matrix, int rows, int columns) {
  Doubles result(matrix.size());
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) result[column * rows + row] = matrix[row * columns + column];
  }
  return result;
}

// Rows of ``period`` tokens at a time; 0: of all.
template <typename T>
std::vector<float> input(int width, int tokens, int halves, int channels, bool affine, int period = 0) {
  if (period == 0) period = tokens;
  const int rows = tokens * halves;
  // Every tensor from numbers of its own: the first tokens' are the same in a larger batch. The bias is far from 0
  // beside its spread: no difference of large squares gets this right.
  const Tensor<float> x(Random(3).normals(tokens * channels)), weight(Random(5).normals(channels * width)),
      bias(Random(6).normals(width, 1.0, 30.0));
  Random random(7);
  const Following<T> following(random, rows, width, affine);
  const OperandOut<T> operand(static_cast<std::size_t>(rows) * width, affine);
  const Array<float> h(static_cast<std::size_t>(rows) * width);
  const auto launch = [&] {
    return cspd::input(Type<T>::kOperand, x.get(), weight.get(), bias.get(), h.get(), following.get(), operand.get(),
                       tokens, halves, channels, width, period, true, nullptr);
  };
  if (tokens == 0) {
    RUN(launch());
  } else {
    run_early(launch, x, weight, following.mods);
  }
  auto expected = linear(x.values, transposed(weight.values, channels, width), bias.values);
  if (halves == 2) {
    const auto of_tokens = expected;
    expected.clear();
    for (int first = 0; first < tokens; first += period) {
      for (int half = 0; half < 2; ++half) {
        expected.insert(expected.end(), of_tokens.begin() + first * width,
                        of_tokens.begin() + (first + period) * width);
      }
    }
  }
  CHECK_ALL_NEAR(h.host(), expected, 3e-6);
  const auto got = operand.host();
  CHECK_ALL_NEAR(got, following.plain(expected, width), following.rounding() + 2e-5);
  return {got.begin(), got.end()};
}

// ``product`` or, without one, only the operand from h.
template <typename T>
std::vector<float> residual(int width, int rows, bool affine, bool with_product = true) {
  Random random(4);
  const auto count = static_cast<std::size_t>(rows) * width;
  const Tensor<T> product(random.normals(count)), bias(random.normals(width)), mods(random.normals(3 * count));
  const Tensor<float> h(random.normals(count, 1.0, 2.0));
  const Following<T> following(random, rows, width, affine);
  const OperandOut<T> operand(count, affine);
  const auto launch = [&] {
    if (!with_product) {
      return cspd::residual(Type<T>::kOperand, nullptr, nullptr, nullptr, h.array.get(), following.get(), operand.get(),
                            rows, width, nullptr);
    }
    return cspd::residual(Type<T>::kOperand, product.get(), bias.get(), mods.get(), h.array.get(), following.get(),
                          operand.get(), rows, width, nullptr);
  };
  if (rows == 0) {
    RUN(launch());
  } else {
    run_early(launch, product, mods, h, following.mods);
  }
  Doubles expected = h.values;
  for (std::size_t i = 0; with_product && i < count; ++i) {
    const std::size_t row = i / width, column = i % width;
    expected[i] += mods.values[(3 * row + 2) * width + column] * (product.values[i] + bias.values[column]);
  }
  CHECK_ALL_NEAR(h.array.host(), expected, with_product ? 1e-6 : 0.0);
  const auto got = operand.host();
  CHECK_ALL_NEAR(got, following.plain(expected, width), following.rounding() + 2e-6);
  return {got.begin(), got.end()};
}

template <typename T>
void every_size() {
  const check::In type(Type<T>::kName);
  for (const int width : kWidths) {
    const int many = device::small || width > 1000 ? 5 : 70;
    for (const int rows : {0, 1, many}) {
      const check::In in(check::text(rows) + " rows of width " + check::text(width));
      condition<T>(width, 1, rows);
      condition<T>(width, 3, rows);
      bias_silu<T>(width, rows);
      for (const bool affine : {false, true}) {
        input<T>(width, rows, 1, 16, affine);
        input<T>(width, rows, 2, affine ? 3 : 64, affine);
        residual<T>(width, rows, affine);
        residual<T>(width, rows, affine, false);
      }
    }
  }
  // Up to 64 tokens a block of the input has one token, and then four, the last block perhaps fewer.
  for (const int tokens : {64, 65, 67}) input<T>(tokens == 67 ? 1040 : 272, tokens, 2, 5, true);
  for (const int halves : {1, 2}) {
    for (const int period : {1, 3, 70}) {
      for (const int steps : {1, 4, 23}) input<T>(48, period * steps, halves, 3, true, period);
    }
  }
}

template <typename T>
void any_order() {
  for (const int width : {48, 2048}) {
    device::in_any_order([&] { return residual<T>(width, 3, true); });
    device::in_any_order([&] { return input<T>(width, 3, 2, 5, true); });
    device::in_any_order([&] { return input<T>(width, 66, 1, 5, true); });
  }
}

// Blocks of several tokens serve larger batches.
void a_token_is_the_same_in_every_batch() {
  const auto alone = input<bfloat16>(304, 3, 1, 5, true);
  auto among_others = input<bfloat16>(304, 66, 1, 5, true);
  among_others.resize(alone.size());
  CHECK_SAME_BITS(among_others, alone);
}

// ``live`` is 0: nothing is written. What sees that it is written where it is not: every other test.
template <typename T>
void called_off() {
  constexpr int kWidth = 48, kRows = 5, kChannels = 3;
  const auto type = Type<T>::kOperand;
  Random random(9);
  const auto count = static_cast<std::size_t>(kRows) * kWidth;
  const Tensor<T> product(random.normals(count)), bias(random.normals(kWidth)), mods(random.normals(3 * count)),
      square(random.normals(kWidth * kWidth));
  const Tensor<float> x(random.normals(kRows * kChannels)), weight(random.normals(kChannels * kWidth)),
      biases(random.normals(kWidth));
  const Following<T> following(random, kRows, kWidth, true);
  const Array<T> operand(count), value(count);
  const Array<float> h(count);
  const Array<std::int32_t> live({1});
  const auto run = [&](const auto& launch) {
    live.set({1});
    device::run_early([&] { live.set({0}); }, launch);  // the kernel before it calls it off
  };
  run([&] { return cspd::bias_silu(type, value.get(), bias.get(), {}, kRows, kWidth, nullptr, live.get()); });
  run([&] {
    return cspd::input(type, x.get(), weight.get(), biases.get(), h.get(), following.get(), operand.get(), kRows, 1,
                       kChannels, kWidth, kRows, true, nullptr, live.get());
  });
  run([&] {
    return cspd::residual(type, product.get(), bias.get(), mods.get(), h.get(), following.get(), operand.get(), kRows,
                          kWidth, nullptr, live.get());
  });
  if (sizeof(T) == 2) {
    for (const bool second : {false, true}) {
      const cspd::Product layer = {
          product.get(), square.get(), bias.get(), value.get(), mods.get(), second ? h.get() : nullptr, {},
          kRows,         kWidth,       live.get()};
      run([&] { return cspd::product(type, layer, 32, 32, nullptr); });
    }
  }
  const Tensor<float> final_weight(random.normals(2 * kChannels * kWidth)), final_bias(random.normals(2 * kChannels)),
      rows(random.normals(count)), one({1.0f});
  const Array<cspd::StepTable> table({table_of(2)});
  const Array<float> to(kRows * kChannels);
  cspd::Update update = {};
  update.operand = rows.get();
  update.ends = {nullptr, nullptr, final_weight.get(), final_bias.get()};
  update.table = table.get();
  update.temperature = one.get();
  update.noise = {x.get(), 0, nullptr, nullptr};
  update.x = update.log_std = update.path = to.get();
  update.tokens = kRows;
  update.step = 2;
  update.channels = kChannels;
  update.width = kWidth;
  update.learned = true;
  update.live = live.get();
  run([&] { return cspd::update(update, nullptr); });
  CHECK(value.untouched() && h.untouched() && operand.untouched() && to.untouched());
}

void widths_beyond_the_kernels() {
  const Array<float> memory(3 * 4096);
  float* at = memory.get();
  const auto type = cspd::Operand::kFloat32;
  const cspd::AnyModulation none = {nullptr, nullptr, at, kEpsilon};
  for (const int width : {-16, 0, 8, 24, 2064, 4096}) {
    CHECK(cspd::condition(type, at, at, at, 1, 1, width, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::bias_silu(type, at, at, {}, 1, width, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::input(type, at, at, at, at, none, at, 1, 1, 1, width, 1, false, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::residual(type, at, at, at, at, none, at, 1, width, nullptr) == cudaErrorInvalidValue);
    const cspd::Product product = {at, at, at, at, nullptr, nullptr, {}, 1, width};
    CHECK(cspd::product(cspd::Operand::kBfloat16, product, 16, 16, nullptr) == cudaErrorInvalidValue);
    cspd::Update update = {};
    update.x = at;
    update.tokens = 1;
    update.channels = 1;
    update.width = width;
    CHECK(cspd::update(update, nullptr) == cudaErrorInvalidValue);
  }
  CHECK(cspd::bias_silu(static_cast<cspd::Operand>(3), at, at, {}, 1, 16, nullptr) == cudaErrorInvalidValue);
  device::synchronise();
  CHECK(memory.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("layered", argc, argv, [] {
    every_size<float>();
    every_size<float16>();
    every_size<bfloat16>();
    any_order<float>();
    any_order<bfloat16>();
    a_token_is_the_same_in_every_batch();
    called_off<float>();
    called_off<bfloat16>();
    widths_beyond_the_kernels();
  });
}
