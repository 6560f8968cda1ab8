// Conversions of half-precision values, all of them, against rounding by ldexp and nearbyint.
#include <cfenv>

#include "check.h"
#include "cspd/portable.cuh"
#include "random.h"

namespace {

using cspd::bfloat16;
using cspd::float16;

// Digits of the significand, and the exponent of the smallest normal value and of the first power beyond the largest.
struct Format {
  int digits, smallest, beyond;
};

template <typename T>
constexpr Format kFormat = {};
template <>
constexpr Format kFormat<float16> = {11, -14, 16};
template <>
constexpr Format kFormat<bfloat16> = {8, -126, 128};

template <typename T>
double plain_value(std::uint16_t bits) {
  const auto& format = kFormat<T>;
  const int fraction_bits = format.digits - 1, exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (0x7fff >> fraction_bits)) return fraction ? NAN : sign * INFINITY;
  const int significand = exponent ? fraction + (1 << fraction_bits) : fraction;
  return sign * std::ldexp(significand, (exponent ? exponent - 1 : 0) + format.smallest - fraction_bits);
}

// The nearest value of the format, ties to even, as a double.
template <typename T>
double plain_rounded(double value) {
  const auto& format = kFormat<T>;
  if (!std::isfinite(value) || value == 0.0) return value;
  const int last = std::max(std::ilogb(value), format.smallest) - (format.digits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
  return std::fabs(rounded) >= std::ldexp(1.0, format.beyond) ? std::copysign(INFINITY, value) : rounded;
}

template <typename T>
void check_rounding(float value) {
  const auto got = cspd::from_float<T>(value);
  if (std::isnan(value)) {
    CHECK(std::isnan(plain_value<T>(got.bits)));
    return;
  }
  const double expected = plain_rounded<T>(value), as_double = plain_value<T>(got.bits);
  // The sign of zero counts.
  CHECK_EQUAL(as_double, expected) && CHECK_EQUAL(std::signbit(as_double), std::signbit(expected));
}

template <typename T>
void every_pattern() {
  for (int pattern = 0; pattern < 0x10000; ++pattern) {
    const auto bits = static_cast<std::uint16_t>(pattern);
    const double expected = plain_value<T>(bits);
    const float got = cspd::to_float(T{bits});
    if (std::isnan(expected)) {
      CHECK(std::isnan(got));
      CHECK(std::isnan(cspd::to_float(cspd::from_float<T>(got))));
      continue;
    }
    CHECK_EQUAL(static_cast<double>(got), expected) && CHECK_EQUAL(std::signbit(got), std::signbit(expected));
    CHECK_EQUAL(cspd::from_float<T>(got).bits, bits);
    if (!std::isfinite(expected)) continue;
    // The tie between this value and the next, and both sides of it; beyond the largest comes the first power.
    const double largest = std::ldexp(1.0, kFormat<T>.beyond);
    const double next = plain_value<T>(static_cast<std::uint16_t>(bits + 1));
    const double tie = 0.5 * (expected + (std::isfinite(next) ? next : std::copysign(largest, expected)));
    const auto middle = static_cast<float>(tie);
    if (std::isinf(middle)) continue;
    for (const float value : {std::nextafter(middle, -INFINITY), middle, std::nextafter(middle, INFINITY)}) {
      check_rounding<T>(value);
    }
  }
}

// All magnitudes: subnormal, overflowing, infinite, NaN.
template <typename T>
void random_patterns() {
  Random random(1);
  for (int i = 0; i < 500000; ++i) check_rounding<T>(cspd::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
  for (const float value : {0.0f, -0.0f, 65504.0f, 65519.99f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 3.4028235e38f,
                            3.3961775e38f, 0x1p-149f, INFINITY, -INFINITY, NAN}) {
    check_rounding<T>(value);
    check_rounding<T>(-value);
  }
}

}  // namespace

int main() {
  std::fesetround(FE_TONEAREST);
  every_pattern<float16>();
  every_pattern<bfloat16>();
  random_patterns<float16>();
  random_patterns<bfloat16>();
  CHECK_EQUAL(cspd::from_float<float>(1.1f), 1.1f);
  for (const double x : {-80.0, -3.0, -1e-3, 0.0, 0.5, 4.0, 30.0}) {
    CHECK_NEAR(cspd::silu(static_cast<float>(x)), x / (1.0 + std::exp(-x)), 5e-7);
  }
  return check::finish("types");
}
