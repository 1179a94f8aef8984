// Loads and stores between the tensors' dtypes and what a kernel computes in.

#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/vector.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

INLINE float half_to_float(uint16_t h) {  // branch-free, so that a loop of it is vector code
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  uint32_t shifted = magnitude;
  float f;
  __builtin_memcpy(&f, &shifted, 4);
  f *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' biases
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  bits = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits) | sign;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

INLINE float bfloat16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

INLINE uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// What a cache of a dtype holds, as vectors of the U that products take; kElements to a vector.
template <class U>
struct Raw {  // as it is
  static constexpr int64_t kElements = kLanes<U> * kDepth<U>;
  static constexpr int64_t kBytes = sizeof(U) / kDepth<U>;  // of an element
  INLINE static Vec<U> vector(const char* from) { return vec(reinterpret_cast<const U*>(from)); }
};
struct FromBFloat16 {
  static constexpr int64_t kElements = kLanes<float>, kBytes = 2;
  typedef short Narrow __attribute__((vector_size(FA3NPU_BYTES / 2)));
  typedef int Wide __attribute__((vector_size(FA3NPU_BYTES)));
  INLINE static Vec<float> vector(const char* from) {
#if FA3NPU_AVX512  // gcc 12's convertvector would take three instructions
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__aarch64__)  // and one lane after another here
    return (Vec<float>)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16);
#else
    Narrow x;
    __builtin_memcpy(&x, from, sizeof(x));
    return (Vec<float>)(__builtin_convertvector(x, Wide) << 16);
#endif
  }
};
struct FromHalf {
  static constexpr int64_t kElements = kLanes<float>, kBytes = 2;
  INLINE static Vec<float> vector(const char* from) {
#if FA3NPU_AVX512
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(from)));
#else
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    Vec<float> x;
    for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = half_to_float(half[i]);
    return x;
#endif
  }
};

// f(the reader of a cache's dtype), if there is one.
template <class U, class F>
INLINE bool with_reader(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<U, float>) {
    if (dtype == ScalarType::BFloat16) return f(FromBFloat16()), true;
    if (dtype == ScalarType::Half) return f(FromHalf()), true;
    if (dtype != ScalarType::Float) return false;
  }
  return f(Raw<U>()), true;
}

// A NaN of the caller's float32, with bits that rounding to bfloat16 keeps.
template <class T>
INLINE T quiet(T x) {
  return x == x ? x : std::numeric_limits<T>::quiet_NaN();
}

// n elements of a head vector, as U; a last half Pair is filled up with zero.
template <class U>
void load_row(const char* from, ScalarType dtype, int64_t n, U* to) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  if constexpr (std::is_same_v<U, Pair>) {
    to[(n - 1) / 2].second = 0;
    __builtin_memcpy(to, from, 2 * n);
  } else {
    switch (dtype) {
      case ScalarType::BFloat16:
        for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(half[i]);
        break;
      case ScalarType::Half:
        for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(half[i]);
        break;
      case ScalarType::Float8_e4m3fn:
        for (int64_t i = 0; i < n; ++i) to[i] = float8_table()[uint8_t(from[i])];
        break;
      case ScalarType::Float:
        for (int64_t i = 0; i < n; ++i) to[i] = reinterpret_cast<const float*>(from)[i];
        break;
      default:
        for (int64_t i = 0; i < n; ++i) to[i] = reinterpret_cast<const double*>(from)[i];
    }
  }
}

template <class T>
void store_row(const T* from, T scale, ScalarType dtype, int64_t n, char* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
  switch (dtype) {
    case ScalarType::BFloat16:
      for (; i < n; ++i) half[i] = float_to_bfloat16(float(from[i] * scale));
      break;
    case ScalarType::Half:
#if FA3NPU_AVX512
      if constexpr (sizeof(T) == 4)
        for (; i + 16 <= n; i += 16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i),
                              _mm512_cvtps_ph(vec(from + i) * scale, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
      if constexpr (sizeof(T) == 4)
        for (; i + 4 <= n; i += 4)
          vst1_f16(reinterpret_cast<float16_t*>(half + i), vcvt_f16_f32(vec(from + i) * scale));
#endif
      for (; i < n; ++i) half[i] = float_to_half(float(from[i] * scale));
      break;
    case ScalarType::Float:
      for (; i < n; ++i) reinterpret_cast<float*>(to)[i] = float(from[i] * scale);
      break;
    default:
      for (; i < n; ++i) reinterpret_cast<double*>(to)[i] = from[i] * scale;
  }
}

// A number of a U.
template <class T>
INLINE T number(const T& x, int64_t) {
  return x;
}
INLINE float number(const Pair& x, int64_t half) {
  return bfloat16_to_float(half ? x.second : x.first);
}
template <class T>
INLINE void clear(T& x, int64_t) {
  x = 0;
}
INLINE void clear(Pair& x, int64_t half) { (half ? x.second : x.first) = 0; }

// Two vectors of sums as what the next product multiplies.
template <class T>
INLINE void narrow(const Vec<T>& x, const Vec<T>& y, T* to) {
  store(to, x);
  store(to + kLanes<T>, y);
}

#if FA3NPU_BFLOAT16
// Ties away from zero: adding half an ulp and taking the upper halves is faster than the
// instruction. A NaN must be as arithmetic and quiet() leave it.
INLINE __m512i rounded(const Vec<float>& x) {
  return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
}

INLINE void narrow(const Vec<float>& x, const Vec<float>& y, Pair* to) {
  alignas(64) static constexpr auto upper = [] {
    struct {
      uint16_t halves[32];
    } t{};
    for (int i = 0; i < 32; ++i) t.halves[i] = 2 * i + 1;
    return t;
  }();
  const __m512i halves = _mm512_load_si512(upper.halves);
  store(to, (Vec<Pair>)_mm512_permutex2var_epi16(rounded(x), halves, rounded(y)));
}

// Pairs of one row's numbers and the next's.
INLINE Vec<Pair> pair_up(const Vec<float>& first, const Vec<float>& second) {
  const __m512i low = _mm512_srli_epi32(rounded(first), 16);
  return (Vec<Pair>)_mm512_mask_blend_epi16(0xaaaaaaaa, low, rounded(second));
}

// Two rows of 32 bfloat16, interleaved: to[c] is the pair of column c.
INLINE void interleave(const Vec<Pair>& a, const Vec<Pair>& b, Pair* to) {
  // The unpacking instructions take the first and the second half of every 16 bytes.
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i x = _mm512_permutexvar_epi64(halves, (__m512i)a);
  const __m512i y = _mm512_permutexvar_epi64(halves, (__m512i)b);
  store(to, (Vec<Pair>)_mm512_unpacklo_epi16(x, y));
  store(to + 16, (Vec<Pair>)_mm512_unpackhi_epi16(x, y));
}

inline bool all_finite(const Pair* x, int64_t n) {
  Vec<Pair> infinite{};  // lanes with all bits of an exponent set
  for (int64_t i = 0; i < n; i += kLanes<Pair>) {
    const Vec<Pair> pairs = vec(x + i);
    infinite |= (pairs & 0x7f80) == 0x7f80;
    infinite |= (pairs & 0x7f800000) == 0x7f800000;
  }
  return _mm512_test_epi32_mask((__m512i)infinite, (__m512i)infinite) == 0;
}
#endif

template <class T>
bool all_finite(const T* x, int64_t n) {
  Vec<T> zeros[4]{};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>)
    for (int64_t k = 0; k < 4; ++k)
      zeros[k] = multiply_add(vec(x + i + k * kLanes<T>), Vec<T>{}, zeros[k]);
  for (; i < n; i += kLanes<T>) zeros[0] = multiply_add(vec(x + i), Vec<T>{}, zeros[0]);
  zeros[0] += zeros[1] + (zeros[2] + zeros[3]);
  T total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += zeros[0][lane];
  return total == T(0);
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
