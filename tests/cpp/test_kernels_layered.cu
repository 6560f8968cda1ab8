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

template <typename T>
std::vector<float> input(int width, int tokens, int halves, int channels, bool affine) {
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
                       tokens, halves, channels, width, true, nullptr);
  };
  if (tokens == 0) {
    RUN(launch());
  } else {
    run_early(launch, x, weight, following.mods);
  }
  auto expected = linear(x.values, transposed(weight.values, channels, width), bias.values);
  if (halves == 2) expected.insert(expected.end(), expected.begin(), expected.begin() + tokens * width);
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

void widths_beyond_the_kernels() {
  const Array<float> memory(3 * 4096);
  float* at = memory.get();
  const auto type = cspd::Operand::kFloat32;
  const cspd::AnyModulation none = {nullptr, nullptr, at, kEpsilon};
  for (const int width : {-16, 0, 8, 24, 2064, 4096}) {
    CHECK(cspd::condition(type, at, at, at, 1, 1, width, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::bias_silu(type, at, at, {}, 1, width, nullptr) == cudaErrorInvalidValue);
    CHECK(cspd::input(type, at, at, at, at, none, at, 1, 1, 1, width, false, nullptr) == cudaErrorInvalidValue);
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
    widths_beyond_the_kernels();
  });
}
