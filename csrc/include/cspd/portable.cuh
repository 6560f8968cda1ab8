// Types and qualifiers that compile everywhere: for a device, for the host beside it, and by a plain C++ compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CSPD_HD __host__ __device__ __forceinline__
#else
#define CSPD_HD inline
#endif

namespace cspd {

// Storage types of GEMM operands; arithmetic is in float32.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

// N values that are loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

template <typename To, typename From>
CSPD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

CSPD_HD float to_float(float value) { return value; }

CSPD_HD float to_float(bfloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

CSPD_HD float to_float(float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exponents differ by 112; scaling by a power of two gets subnormals right, too.
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}

template <typename T>
CSPD_HD T from_float(float value);

template <>
CSPD_HD float from_float<float>(float value) {
  return value;
}

template <>
CSPD_HD bfloat16 from_float<bfloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const auto bits = bit_cast<std::uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
CSPD_HD float16 from_float<float16>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    const auto rounded = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    return {static_cast<std::uint16_t>(sign | rounded)};
  }
  return {static_cast<std::uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#endif
}

// To two units in the last place.
CSPD_HD float inverse_square_root(float value) {
#ifdef __CUDA_ARCH__
  return rsqrtf(value);
#else
  return 1.0f / std::sqrt(value);
#endif
}

// To a few units in the last place, without a division's slow path.
CSPD_HD float silu(float value) {
#ifdef __CUDA_ARCH__
  return __fdividef(value, 1.0f + expf(-value));
#else
  return value / (1.0f + std::exp(-value));
#endif
}

// sin and cos of 2 pi t for t in [0, 1].
CSPD_HD void sine_cosine_of_turns(float t, float* sine, float* cosine) {
#ifdef __CUDA_ARCH__
  sincospif(2.0f * t, sine, cosine);
#else
  const double angle = 6.283185307179586 * static_cast<double>(t);
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
#endif
}

}  // namespace cspd
