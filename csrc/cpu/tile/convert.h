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
#elif FA3NPU_BYTES == 32
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#elif defined(__aarch64__)  // and one lane after another here
    return (Vec<float>)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16);
#else
    Narrow x;
    __builtin_memcpy(&x, from, sizeof(x));
    return (Vec<float>)(__builtin_convertvector(x, Wide) << 16);
#endif
  }
};
#if FA3NPU_BYTES >= 32
typedef int16_t Halves __attribute__((vector_size(FA3NPU_BYTES / 2)));

INLINE Vec<float> floats(const Halves& half) {
#if FA3NPU_AVX512
  return _mm512_cvtph_ps((__m256i)half);
#else
  return _mm256_cvtph_ps((__m128i)half);
#endif
}
#endif

struct FromHalf {
  static constexpr int64_t kElements = kLanes<float>, kBytes = 2;
  INLINE static Vec<float> vector(const char* from) {
#if FA3NPU_BYTES >= 32
    Halves half;
    __builtin_memcpy(&half, from, sizeof(half));
    return floats(half);
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

// The next kLanes<float> bytes as whole numbers.
INLINE Vec<Pair> bytes(const char* from) {
#if FA3NPU_AVX512
  return (Vec<Pair>)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif FA3NPU_BYTES == 32
  return (Vec<Pair>)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  typedef int8_t Narrow __attribute__((vector_size(kLanes<float>)));
  Narrow x;
  __builtin_memcpy(&x, from, sizeof(x));
#if defined(__aarch64__)
  uint32_t all;
  __builtin_memcpy(&all, &x, sizeof(all));
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(all))));
#else
  return __builtin_convertvector(x, Vec<Pair>);
#endif
#endif
}

#if FA3NPU_BYTES >= 32
INLINE Halves signed_bytes(const char* from) {
#if FA3NPU_AVX512
  return (Halves)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return (Halves)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
}
#endif

// Numbers of 8 bits, which float32 and bfloat16 hold exactly.
template <class U>
struct FromInt8 {
  static constexpr int64_t kElements = kLanes<float>, kBytes = 1;
  INLINE static Vec<float> vector(const char* from) {
    return __builtin_convertvector(bytes(from), Vec<float>);
  }
};

// A sign, an exponent that is 0 of numbers without a leading 1, and Mantissa bits. Codes with all
// bits of kSpecial are not finite.
template <int Mantissa>
struct Float8 {
  static constexpr int kBias = Mantissa == 3 ? 7 : 15;
  static constexpr int kSpecial = Mantissa == 3 ? 0x7f : 0x7c;
  static constexpr int kTiny = 1 - kBias - Mantissa;  // the least number is a power of 2: this one
};
template <class U, int Mantissa>
struct FromFloat8 : Float8<Mantissa> {
  using Format = Float8<Mantissa>;
  static constexpr int64_t kElements = kLanes<float>, kBytes = 1;
  INLINE static Vec<float> vector(const char* from) {
#if FA3NPU_BYTES >= 32
    // By way of float16, which has the exponents of one format, and 2^-8 of the other's numbers.
    const Halves code = signed_bytes(from);
    if constexpr (Mantissa == 2) return floats(code << 8);
    const Halves half = (code << 7) & int16_t(0xbf80), nan = half | int16_t(0x7c00);
    return floats((half | int16_t(0x8000)) == int16_t(0xbf80) ? nan : half) * 256.0f;
#else
    constexpr float tiny = 1.0f / (1 << -Format::kTiny);
    const Vec<Pair> code = bytes(from), magnitude = code & 0x7f;
    const Vec<Pair> small = (Vec<Pair>)(__builtin_convertvector(magnitude, Vec<float>) * tiny);
    Vec<Pair> x = (magnitude << (23 - Mantissa)) + ((127 - Format::kBias) << 23);
    x = magnitude < (1 << Mantissa) ? small : x;
    x |= (magnitude >= Format::kSpecial) & 0x7f800000;
    return (Vec<float>)(x | (code & int32_t(0x80000000)));
#endif
  }
};

#if FA3NPU_BFLOAT16
// The upper halves of floats: rounded, if what is below has been taken account of.
INLINE Vec<Pair> upper_halves(const __m512i& x, const __m512i& y) {
  alignas(64) static constexpr auto upper = [] {
    struct {
      uint16_t halves[32];
    } t{};
    for (int i = 0; i < 32; ++i) t.halves[i] = 2 * i + 1;
    return t;
  }();
  return (Vec<Pair>)_mm512_permutex2var_epi16(x, _mm512_load_si512(upper.halves), y);
}

// Both vectors' numbers in turn. Of two rows of 32 bfloat16 these are pairs of a column: those of
// the first 16 columns, and of the last.
template <class U>
struct Interleaved {
  Vec<U> first, last;
};
INLINE Interleaved<Pair> interleaved(const Vec<Pair>& a, const Vec<Pair>& b) {
  // The unpacking instructions take the first and the second half of every 16 bytes.
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i x = _mm512_permutexvar_epi64(halves, (__m512i)a);
  const __m512i y = _mm512_permutexvar_epi64(halves, (__m512i)b);
  return {(Vec<Pair>)_mm512_unpacklo_epi16(x, y), (Vec<Pair>)_mm512_unpackhi_epi16(x, y)};
}

// The whole number n, of at most 8 bits, times a power of 2.
constexpr uint16_t bfloat16_of(int n, int power) {
  int top = 0;
  while (n >> (top + 1)) ++top;
  return uint16_t(n == 0 ? 0 : ((127 + power + top) << 7) | (n << (7 - top) & 0x7f));
}

// The bytes of the bfloat16 that codes of 7 bits stand for.
struct alignas(64) Codes {
  uint8_t low[128], high[128];
};
template <class Value>
constexpr Codes codes(Value value) {
  Codes codes{};
  for (int code = 0; code < 128; ++code) {
    codes.low[code] = uint8_t(value(code));
    codes.high[code] = uint8_t(value(code) >> 8);
  }
  return codes;
}

// The low bytes of 64 bfloat16, and the high ones.
struct Bytes {
  __m512i low, high;
};
// An index has 7 bits: the sign, its eighth, is put where it belongs. High bytes that are not
// wanted are zero.
INLINE Bytes looked_up(const Codes& codes, const __m512i& index, const __m512i& sign,
                       __mmask64 wanted = -1) {
  const auto table = [](const uint8_t* at) INLINE_LAMBDA { return _mm512_load_si512(at); };
  const __m512i high =
      _mm512_maskz_permutex2var_epi8(wanted, table(codes.high), index, table(codes.high + 64));
  return {
      _mm512_permutex2var_epi8(table(codes.low), index, table(codes.low + 64)),
      _mm512_ternarylogic_epi32(high, sign, _mm512_set1_epi8(-128), 0xf8)};  // high | sign & -128
}

INLINE __m512i half_vector(const char* from) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Places of two vectors' bytes: what unpacking takes apart lies in order then.
template <class At>
constexpr auto byte_places(At at) {
  struct alignas(64) {
    uint8_t at[64];
  } places{};
  for (int i = 0; i < 64; ++i) places.at[i] = uint8_t(at(i / 16, i % 16));
  return places;
}

// A cache of codes. Bytes are looked up after they were put in order: half the shuffles.
template <class Format>
struct FromCodes {
  static constexpr int64_t kElements = 2 * kLanes<Pair>, kBytes = 1;

  INLINE static Vec<Pair> vector(const char* from) {
    static constexpr auto places =
        byte_places([](int quarter, int i) { return 8 * quarter + i % 8; });
    const __m512i order = _mm512_load_si512(places.at);
    const Bytes x = Format::bytes(_mm512_permutexvar_epi8(order, half_vector(from)));
    return (Vec<Pair>)_mm512_unpacklo_epi8(x.low, x.high);
  }

  // As interleaved(vector(a), vector(b)).
  INLINE static Interleaved<Pair> interleaved(const char* a, const char* b) {
    static constexpr auto places = byte_places(
        [](int quarter, int i) { return (i % 2) * 64 + (i / 8) * 16 + 4 * quarter + i / 2 % 4; });
    const Bytes x = Format::bytes(
        _mm512_permutex2var_epi8(half_vector(a), _mm512_load_si512(places.at), half_vector(b)));
    return {(Vec<Pair>)_mm512_unpacklo_epi8(x.low, x.high),
            (Vec<Pair>)_mm512_unpackhi_epi8(x.low, x.high)};
  }

  // x[i] = the pair i of columns of 16 rows: as transpose_square of their vectors.
  INLINE static void transposed(const char* const* from, int64_t offset, Vec<Pair>* x) {
    const auto two_rows = [&](int i) INLINE_LAMBDA {  // 32 codes of each
      const auto row = [&](int j) INLINE_LAMBDA {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[j] + offset));
      };
      return _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(i + 4), 1);
    };
    __m512i rows[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = two_rows(i % 4 + i / 4 * 8);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      // Of rows i, i + 4, i + 8, i + 12.
      const auto quarters = [&](int i) INLINE_LAMBDA {
        return half ? _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd)
                    : _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
      };
      const __m512i a = quarters(0), b = quarters(1), c = quarters(2), d = quarters(3);
      const __m512i ac_low = _mm512_unpacklo_epi16(a, c), ac_high = _mm512_unpackhi_epi16(a, c);
      const __m512i bd_low = _mm512_unpacklo_epi16(b, d), bd_high = _mm512_unpackhi_epi16(b, d);
      const __m512i pairs[] = {
          _mm512_unpacklo_epi16(ac_low, bd_low), _mm512_unpackhi_epi16(ac_low, bd_low),
          _mm512_unpacklo_epi16(ac_high, bd_high), _mm512_unpackhi_epi16(ac_high, bd_high)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Bytes y = Format::bytes(pairs[i]);
        x[8 * half + 2 * i] = (Vec<Pair>)_mm512_unpacklo_epi8(y.low, y.high);
        x[8 * half + 2 * i + 1] = (Vec<Pair>)_mm512_unpackhi_epi8(y.low, y.high);
      }
    }
  }
};

template <>
struct FromInt8<Pair> : FromCodes<FromInt8<Pair>> {
  // At 0 lies what 128 needs, a magnitude of 8 bits: 0 itself takes no high byte.
  static constexpr Codes kCodes = codes([](int n) { return bfloat16_of(n == 0 ? 128 : n, 0); });
  INLINE static Bytes bytes(const __m512i& x) {
    return looked_up(kCodes, _mm512_abs_epi8(x), x, _mm512_test_epi8_mask(x, x));
  }
};

template <int Mantissa>
struct FromFloat8<Pair, Mantissa> : Float8<Mantissa>, FromCodes<FromFloat8<Pair, Mantissa>> {
  using Format = Float8<Mantissa>;
  static constexpr Codes kCodes = codes([](int code) {
    if (code < 1 << Mantissa) return bfloat16_of(code, Format::kTiny);
    const int x = (code << (7 - Mantissa)) + ((127 - Format::kBias) << 7);
    return uint16_t(code >= Format::kSpecial ? x | 0x7f80 : x);
  });
  INLINE static Bytes bytes(const __m512i& x) { return looked_up(kCodes, x, x); }
};
#endif

// Whether From has ways of its own to interleave and to transpose.
template <class From>
constexpr bool kOfCodes = requires { &From::transposed; };

// f(the reader of a dtype of 16 bits or more), if there is one.
template <class U, class F>
INLINE bool with_wide_reader(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<U, float>) {
    if (dtype == ScalarType::BFloat16) return f(FromBFloat16()), true;
    if (dtype == ScalarType::Half) return f(FromHalf()), true;
    if (dtype != ScalarType::Float) return false;
  }
  return f(Raw<U>()), true;
}

// f(the reader of a cache's dtype), if there is one.
template <class U, class F>
INLINE bool with_reader(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<U, float> || (kDepth<U> == 2 && FA3NPU_BFLOAT16)) {
    if (dtype == ScalarType::Float8_e4m3fn) return f(FromFloat8<U, 3>()), true;
    if (dtype == ScalarType::Float8_e5m2) return f(FromFloat8<U, 2>()), true;
    if (dtype == ScalarType::Char) return f(FromInt8<U>()), true;
  }
  return with_wide_reader<U>(dtype, f);
}

// A NaN of the caller's float32, with bits that rounding to bfloat16 keeps.
template <class T>
INLINE T quiet(T x) {
  return x == x ? x : std::numeric_limits<T>::quiet_NaN();
}

INLINE void set(float& x, int64_t, float value) { x = value; }
INLINE void set(Pair& x, int64_t half, float value) {
  (half ? x.second : x.first) = float_to_bfloat16(value);
}

// n numbers of 8 bits: whole vectors, and what is left over one by one.
template <class U>
void load_narrow_row(const char* from, ScalarType dtype, int64_t n, U* to) {
  int64_t i = 0;
  with_reader<U>(dtype, [&](auto reader) {
    for (; i + reader.kElements <= n; i += reader.kElements)
      store(to + i / kDepth<U>, reader.vector(from + i));
  });
  const float* values = i < n ? narrow_values(dtype) : nullptr;
  for (; i < n; ++i) set(to[i / kDepth<U>], i % kDepth<U>, values[uint8_t(from[i])]);
}

// n elements of a head vector, as U; a last half Pair is filled up with zero.
template <class U>
void load_row(const char* from, ScalarType dtype, int64_t n, U* to) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  if constexpr (std::is_same_v<U, Pair>) to[(n - 1) / 2].second = 0;
  if constexpr (!std::is_same_v<U, double>)
    if (is_narrow(dtype)) return load_narrow_row(from, dtype, n, to);
  if constexpr (std::is_same_v<U, Pair>) {
    __builtin_memcpy(to, from, 2 * n);
  } else {
    switch (dtype) {
      case ScalarType::BFloat16:
        for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(half[i]);
        break;
      case ScalarType::Half:
        for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(half[i]);
        break;
      case ScalarType::Float:
        for (int64_t i = 0; i < n; ++i) to[i] = reinterpret_cast<const float*>(from)[i];
        break;
      default:
        for (int64_t i = 0; i < n; ++i) to[i] = reinterpret_cast<const double*>(from)[i];
    }
  }
}

#if FA3NPU_AVX512
INLINE Halves bfloat16s(const Vec<float>& x) {  // as float_to_bfloat16
  const Vec<Pair> bits = (Vec<Pair>)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((x == x ? rounded : Vec<Pair>{} + 0x7fc00000) >> 16, Halves);
}
#endif

template <class T>
void store_row(const T* from, T scale, ScalarType dtype, int64_t n, char* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
  switch (dtype) {
    case ScalarType::BFloat16:
#if FA3NPU_AVX512
      if constexpr (sizeof(T) == 4)
        for (; i + 16 <= n; i += 16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i),
                              (__m256i)bfloat16s(vec(from + i) * scale));
#endif
      for (; i < n; ++i) half[i] = float_to_bfloat16(float(from[i] * scale));
      break;
    case ScalarType::Half:
#if FA3NPU_AVX512
      if constexpr (sizeof(T) == 4)
        for (; i + 16 <= n; i += 16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i),
                              _mm512_cvtps_ph(vec(from + i) * scale, _MM_FROUND_TO_NEAREST_INT));
#elif FA3NPU_BYTES == 32
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i),
                           _mm256_cvtps_ph(vec(from + i) * scale, _MM_FROUND_TO_NEAREST_INT));
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

#if FA3NPU_BFLOAT16
// Ties away from zero: adding half an ulp and taking the upper halves is faster than the
// instruction. A NaN must be as arithmetic and quiet() leave it.
INLINE __m512i rounded(const Vec<float>& x) {
  return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
}

// Two vectors of sums as what the next product multiplies.
INLINE void narrow(const Vec<float>& x, const Vec<float>& y, Pair* to) {
  store(to, upper_halves(rounded(x), rounded(y)));
}

// Pairs of one row's numbers and the next's.
INLINE Vec<Pair> pair_up(const Vec<float>& first, const Vec<float>& second) {
  const __m512i low = _mm512_srli_epi32(rounded(first), 16);
  return (Vec<Pair>)_mm512_mask_blend_epi16(0xaaaaaaaa, low, rounded(second));
}

INLINE void interleave(const Vec<Pair>& a, const Vec<Pair>& b, Pair* to) {
  const Interleaved<Pair> pairs = interleaved(a, b);
  store(to, pairs.first);
  store(to + 16, pairs.last);
}

INLINE Interleaved<float> interleaved(const Vec<float>& a, const Vec<float>& b) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, last, b)};
}

// What is below the smallest normal number counts as zero, as tiles have it.
INLINE Vec<float> flushed(const Vec<float>& x) {
  const auto bits = (Vec<Pair>)x;
  return (Vec<float>)((bits & 0x7fffffff) < 0x00800000 ? bits & ~0x7fffffff : bits);
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
