// The kernels between two products of the layered chain: condition, bias_silu, input, residual.
#include "layers.h"

namespace {

using cspd::bfloat16;
using cspd::float16;
using device::Array;

constexpr float kEpsilon = 0.1f;  // large enough to show
const std::vector<int> kWidths = {16, 48, 1040, 2048, 4096};

template <typename T>
void condition(int width, int steps, int rows, bool own = false) {
  Random random(1);
  const Tensor<T> y(random.normals(rows * width));
  const Tensor<float> time(random.normals((own ? rows : steps) * width));
  const Array<T> out(static_cast<std::size_t>(steps) * rows * width);
  RUN(cspd::condition(Type<T>::kOperand, y.get(), time.get(), out.get(), steps, rows, width, own, nullptr));
  Doubles expected;
  for (int i = 0; i < steps * rows * width; ++i) {
    const int of_time = own ? i / width : i / (rows * width);
    expected.push_back(silu(time.values[of_time * width + i % width] + y.values[i % (rows * width)]));
  }
  CHECK_ALL_NEAR(doubles(out.host()), expected, Type<T>::kRounding);
}

// Of a network of another width, whose modulations are asked for ahead.
template <typename T>
void bias_silu(int hidden, int rows, bool swiglu, int width) {
  const check::In in(swiglu ? "swiglu" : "silu");
  Random random(2);
  const int columns = swiglu ? 2 * hidden : hidden;
  const Tensor<T> value(random.normals(rows * columns, 2.0)), bias(random.normals(columns));
  const Array<T> gates(static_cast<std::size_t>(3) * rows * width), next(static_cast<std::size_t>(2) * rows * width);
  const auto launch = [&] {
    const cspd::Ahead ahead = {gates.get(), next.get(), 2 * width, width};
    return cspd::bias_silu(Type<T>::kOperand, value.array.get(), bias.get(), ahead, rows, hidden, swiglu, nullptr);
  };
  if (rows == 0) {
    RUN(launch());
  } else {
    run_early(launch, value);
  }
  Doubles expected = value.values;
  for (int i = 0; i < rows * hidden; ++i) {
    const int at = i / hidden * columns + i % hidden;
    expected[at] = silu(value.values[at] + bias.values[i % hidden]);
    if (swiglu) expected[at] *= value.values[at + hidden] + bias.values[hidden + i % hidden];
  }
  CHECK_ALL_NEAR(doubles(value.array.host()), expected, Type<T>::kRounding);
}

// What turns h into the next operand: affine, with three column blocks of modulations and an operand of type T, or
// not, with two and in float32.
template <typename T>
struct Following {
  Tensor<float> gain, offset;
  Tensor<T> mods;
  bool affine, rms;

  Following(Random& random, int rows, int width, bool affine, bool rms = false)
      : gain(random.normals(width, 0.3, 1.0)),
        offset(random.normals(width)),
        mods(random.normals(static_cast<std::size_t>(rows) * width * (affine ? 3 : 2), 0.5)),
        affine(affine),
        rms(rms) {}

  cspd::AnyModulation get() const {
    return {affine ? gain.get() : nullptr, affine ? offset.get() : nullptr, mods.get(), kEpsilon, rms};
  }

  // The operand of h [rows, W].
  Doubles plain(const Doubles& h, int width) const {
    Doubles out;
    for (std::size_t row = 0; row < h.size() / width; ++row) {
      const double* own = mods.values.data() + row * width * (affine ? 3 : 2);
      const auto one = modulated(h.data() + row * width, width, affine ? gain.values : Doubles{},
                                 affine ? offset.values : Doubles{}, own, kEpsilon, rms);
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
std::vector<float> input(int width, int tokens, int groups, int channels, bool affine, int period = 0,
                         bool rms = false) {
  if (period == 0) period = tokens;
  const int rows = tokens * groups;
  // Every tensor from numbers of its own: the first tokens' are the same in a larger batch. The bias is far from 0
  // beside its spread: no difference of large squares gets this right.
  const Tensor<float> x(Random(3).normals(tokens * channels)), weight(Random(5).normals(channels * width)),
      bias(Random(6).normals(width, 1.0, 30.0));
  Random random(7);
  const Following<T> following(random, rows, width, affine, rms);
  const OperandOut<T> operand(static_cast<std::size_t>(rows) * width, affine);
  const Array<float> h(static_cast<std::size_t>(rows) * width);
  const auto launch = [&] {
    return cspd::input(Type<T>::kOperand, x.get(), weight.get(), bias.get(), h.get(), following.get(), operand.get(),
                       tokens, groups, channels, width, period, true, nullptr);
  };
  if (tokens == 0) {
    RUN(launch());
  } else {
    run_early(launch, x, weight, following.mods);
  }
  auto expected = linear(x.values, transposed(weight.values, channels, width), bias.values);
  if (groups > 1) {
    const auto of_tokens = expected;
    expected.clear();
    for (int first = 0; first < tokens; first += period) {
      for (int group = 0; group < groups; ++group) {
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
std::vector<float> residual(int width, int rows, bool affine, bool with_product = true, bool rms = false) {
  Random random(4);
  const auto count = static_cast<std::size_t>(rows) * width;
  const Tensor<T> product(random.normals(count)), bias(random.normals(width)), mods(random.normals(3 * count));
  const Tensor<float> h(random.normals(count, 1.0, 2.0));
  const Following<T> following(random, rows, width, affine, rms);
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
    const int many = device::small || width > 1000 ? 5 : 70, hidden = width == 48 ? 80 : width;
    for (const int rows : {0, 1, many}) {
      const check::In in(check::text(rows) + " rows of width " + check::text(width));
      condition<T>(width, 1, rows);
      condition<T>(width, 3, rows);
      condition<T>(width, 1, rows, true);
      for (const bool swiglu : {false, true}) bias_silu<T>(hidden, rows, swiglu, width);
      for (const bool affine : {false, true}) {
        input<T>(width, rows, 1, 16, affine);
        input<T>(width, rows, 2, affine ? 3 : 64, affine);
        residual<T>(width, rows, affine);
        residual<T>(width, rows, affine, false);
        input<T>(width, rows, 3, 5, affine, 0, true);
        residual<T>(width, rows, affine, true, true);
      }
    }
  }
  // Up to 64 tokens a block of the input has one token, and then four, the last block perhaps fewer.
  // Of wider rows it always has one.
  for (const int tokens : {64, 65, 67}) input<T>(tokens == 67 ? 1040 : 272, tokens, 2, 5, true);
  input<T>(2064, 66, 1, 2, true);
  input<T>(48, 67, 3, 256, true, 0, true);
  bias_silu<T>(144, 3, true, 2064);
  for (const int groups : {1, 2, 3}) {
    for (const int period : {1, 3, 70}) {
      for (const int steps : {1, 4, 23}) input<T>(48, period * steps, groups, 3, true, period);
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
  run([&] { return cspd::bias_silu(type, value.get(), bias.get(), {}, kRows, kWidth, false, nullptr, live.get()); });
  run([&] { return cspd::bias_silu(type, value.get(), mods.get(), {}, 2, kWidth, true, nullptr, live.get()); });
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
          kRows,         kWidth,       kWidth,     false,       live.get()};
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
  update.groups = 1;
  update.channels = kChannels;
  update.width = kWidth;
  update.learned = true;
  update.live = live.get();
  run([&] { return cspd::update(update, nullptr); });
  CHECK(value.untouched() && h.untouched() && operand.untouched() && to.untouched());
}

void widths_beyond_the_kernels() {
  const Array<float> memory(3 * 8192);
  float* at = memory.get();
  const auto type = cspd::Operand::kFloat32;
  const cspd::AnyModulation none = {nullptr, nullptr, at, kEpsilon};
  for (const int width : {-16, 0, 8, 24, 4112, 8192}) {
    CHECK(cspd::condition(type, at, at, at, 1, 1, width, false, nullptr) == cudaErrorInvalidValue);
    const auto silu = cspd::bias_silu(type, at, at, {}, 1, width < 4096 ? width : width + 8, false, nullptr);
    CHECK(silu == cudaErrorInvalidValue);
    CHECK(cspd::input(type, at, at, at, at, none, at, 1, 1, 1, width, 1, false, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::residual(type, at, at, at, at, none, at, 1, width, nullptr) == cudaErrorInvalidValue);
    cspd::Update update = {};
    update.x = at;
    update.tokens = 1;
    update.groups = 1;
    update.channels = 1;
    update.width = width;
    CHECK(cspd::update(update, nullptr) == cudaErrorInvalidValue);
  }
  CHECK(cspd::bias_silu(static_cast<cspd::Operand>(3), at, at, {}, 1, 16, false, nullptr) == cudaErrorInvalidValue);
  CHECK(cspd::condition(type, at, at, at, 2, 1, 16, true, nullptr) == cudaErrorInvalidValue);
  for (const int groups : {-1, 0, 4}) {
    cspd::Update update = {};
    update.x = at;
    update.tokens = update.channels = 1;
    update.width = 16;
    update.groups = groups;
    CHECK(cspd::update(update, nullptr) == cudaErrorInvalidValue);
  }
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
