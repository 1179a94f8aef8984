// Numbers of 16 or 32 bits as a narrow cache holds them: divided by a descale, rounded to nearest,
// ties to even, and bounded by the largest number of the dtype. NaN stays NaN, and is 0 in int8.

#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/tile/convert.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

typedef int32_t Ints __attribute__((vector_size(FA3NPU_BYTES)));

INLINE Vec<float> bounded(const Vec<float>& x, float least, float most) {  // but for NaN
  const Vec<float> raised = x < least ? Vec<float>{} + least : x;
  return raised > most ? Vec<float>{} + most : raised;
}

INLINE Ints to_integers(const Vec<float>& x) {  // of less than 2^22
  constexpr float kInteger = 1.5f * (1 << 23);
  return __builtin_convertvector((x + kInteger) - kInteger, Ints);
}

struct ToInt8 {
  INLINE static Ints codes(const Vec<float>& x) {
    return to_integers(bounded(x == x ? x : Vec<float>{}, -128, 127));
  }
};

// Rounding carries from the mantissa into the exponent, as it should.
template <int Mantissa>
struct ToFloat8 {
  static constexpr int kLowest = 1 - Float8<Mantissa>::kBias;
  static constexpr float kLargest = Mantissa == 3 ? 448 : 57344;

  INLINE static Ints codes(const Vec<float>& x) {
    const Ints sign = (Ints)x & int32_t(0x80000000);
    const Vec<float> size = bounded((Vec<float>)((Ints)x & 0x7fffffff), 0, kLargest);
    const Ints own = ((Ints)size >> 23) - 127, exponent = own < kLowest ? Ints{} + kLowest : own;
    const Vec<float> scale = (Vec<float>)((127 + Mantissa - exponent) << 23);
    const Ints code = ((exponent - kLowest) << Mantissa) + to_integers(size * scale);
    return (x == x ? code : Ints{} + 127) | ((sign >> 24) & 0x80);
  }
};

template <class To>
INLINE void quantise(const float* x, int64_t n, float descale, uint8_t* to) {
  alignas(64) int32_t codes[kMaxHeadDim];
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Ints some = To::codes(vec(x + i) / descale);
    __builtin_memcpy(codes + i, &some, sizeof(some));
  }
  for (int64_t i = 0; i < n; ++i) to[i] = uint8_t(codes[i]);
}

inline void quantise_row(const char* from, ScalarType dtype, int64_t n, float descale,
                         ScalarType to_dtype, char* to_) {
  alignas(64) float x[kMaxHeadDim] = {};  // in whole vectors
  uint8_t* to = reinterpret_cast<uint8_t*>(to_);
  load_row<float>(from, dtype, n, x);
  switch (to_dtype) {
    case ScalarType::Char:
      return quantise<ToInt8>(x, n, descale, to);
    case ScalarType::Float8_e5m2:
      return quantise<ToFloat8<2>>(x, n, descale, to);
    default:
      return quantise<ToFloat8<3>>(x, n, descale, to);
  }
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
