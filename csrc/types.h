// Conversions between storage types and fp32, one value at a time, and the canonical NaN.
//
// Any result that is NaN is stored as 0x7fffffff (fp32) or 0x7fff (bf16, fp16): what CUDA hardware gives. x86 keeps
// payloads and signs that depend on the order of the operands, so every store of a computed value goes through here.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace detinfer {

DETINFER_HD static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DETINFER_HD static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DETINFER_HD static inline bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

DETINFER_HD static inline float canonical(float value) { return value != value ? bits_to_float(0x7fffffffu) : value; }

DETINFER_HD static inline float bfloat16_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even.
DETINFER_HD static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(is_nan_bits(bits) ? 0x7fffu : rounded);
}

DETINFER_HD static inline float float16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Exact for normal and subnormal values alike: the exponent is rebased by one multiplication with 2^112.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

// Round to nearest, ties to even; overflow gives infinity, values below the least subnormal give a signed zero.
DETINFER_HD static inline uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal in fp16: adding 0.5 leaves the result in the low bits of the sum, rounded by the addition itself.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
}

}  // namespace detinfer
