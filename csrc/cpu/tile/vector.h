// The primitives of an instruction set: vectors as wide as a register, exp, reductions, transposes,
// the multiply-add of products. Everything else is written against them.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/tile/isa.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

// What a product multiplies: a float, a double, or a pair of neighbouring bfloat16 along the summed
// dimension. Products of U are summed as Sum<U>.
struct Pair {
  uint16_t first, second;
};
template <class U>
struct SumOf {
  typedef U type;
};
template <>
struct SumOf<Pair> {
  typedef float type;
};
template <class U>
using Sum = typename SumOf<U>::type;
template <class U>
constexpr int64_t kDepth = std::is_same_v<U, Pair> ? 2 : 1;  // numbers in a U

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(FA3NPU_BYTES)));
  typedef int32_t bits __attribute__((vector_size(FA3NPU_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(FA3NPU_BYTES)));
};
template <>
struct Vector<Pair> {
  typedef typename Vector<float>::bits type;
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int64_t kLanes = FA3NPU_BYTES / sizeof(T);

// A vector from memory, and to it. By value: of a reference clang forgets that it may be unaligned.
template <class T>
INLINE Vec<T> vec(const T* from) {
  typedef Vec<T> Unaligned __attribute__((aligned(1), may_alias));
  return *reinterpret_cast<const Unaligned*>(from);
}
template <class T>
INLINE void store(T* to, const Vec<T>& x) {
  typedef Vec<T> Unaligned __attribute__((aligned(1), may_alias));
  *reinterpret_cast<Unaligned*>(to) = x;
}

// Loaded once: a compiler may load it again for every multiplication.
template <class V>
INLINE void stay(V& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

constexpr float kInf = std::numeric_limits<float>::infinity();

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

template <class T>
INLINE void fill(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <class T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // exact for every x
}

// x y + z, rounded once; twice where no instruction does it. The compiler makes none of its own
// (-ffp-contract=off), so that every rounding is to be read in these files. A Pair adds two
// products.
INLINE Vec<float> multiply_add(const Vec<float>& x, const Vec<float>& y, const Vec<float>& z) {
#if FA3NPU_AVX512
  return _mm512_fmadd_ps(x, y, z);
#elif FA3NPU_BYTES == 32
  return _mm256_fmadd_ps(x, y, z);
#elif defined(__aarch64__)
  return vfmaq_f32(z, x, y);
#else
  return x * y + z;
#endif
}
INLINE Vec<double> multiply_add(const Vec<double>& x, const Vec<double>& y, const Vec<double>& z) {
#if FA3NPU_AVX512
  return _mm512_fmadd_pd(x, y, z);
#elif FA3NPU_BYTES == 32
  return _mm256_fmadd_pd(x, y, z);
#elif defined(__aarch64__)
  return vfmaq_f64(z, x, y);
#else
  return x * y + z;
#endif
}
#if FA3NPU_BFLOAT16
INLINE Vec<Pair> splat(Pair x) {
  int32_t both;
  __builtin_memcpy(&both, &x, 4);
  return (Vec<Pair>)_mm512_set1_epi32(both);
}
INLINE Vec<float> multiply_add(const Vec<Pair>& x, const Vec<Pair>& y, const Vec<float>& z) {
#if defined(__clang__)  // clang 16 never comes back from weighing a shuffle of bfloat16 vectors
  Vec<float> sum = z;
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
#else
  return _mm512_dpbf16_ps(z, (__m512bh)x, (__m512bh)y);
#endif
}
#endif

// sum += x y, with one x for all lanes. gcc 12 never takes a Pair from memory by itself.
template <class T>
INLINE void add_products(const T* x, const Vec<T>& y, Vec<Sum<T>>& sum) {
#if FA3NPU_BFLOAT16 && !defined(__clang__)
  if constexpr (std::is_same_v<T, Pair>) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(y), "m"(*x));
    return;
  }
#endif
  sum = multiply_add(splat(*x), y, sum);
}

// ---- exponentials ----

// x = n log(2) + r, n whole and |r| <= 0.35, for -87.3 <= x <= 88.3
struct Reduced {
  Vec<float> n, r;
};

constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

INLINE Reduced reduced(const Vec<float>& x) {
#if FA3NPU_AVX512
  const Vec<float> n = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
#else
  const Vec<float> n = multiply_add(x, splat(1.44269504088896341f), splat(kWhole)) - kWhole;
#endif
  const Vec<float> r = multiply_add(n, splat(-0.693359375f), x);
  return {n, multiply_add(n, splat(2.12194440e-4f), r)};
}

INLINE Vec<float> exp_tail(const Vec<float>& r) {  // e^r = 1 + r + r^2 exp_tail(r)
  Vec<float> p = multiply_add(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  return multiply_add(p, r, splat(5.0000001201e-1f));
}

INLINE Vec<float> power_of_2(const Vec<float>& n) {
  typedef typename Vector<float>::bits Bits;
  const Bits exponent = (__builtin_convertvector(n, Bits) + 127) << 23;
  return (Vec<float>)exponent;
}

// 2^x: at most 1.2 ulp from -126 to 127.4 (0.95 with FMA; of Pairs, which are rounded, 2.2), exact
// for whole x, 0 below; NaN stays NaN. It takes less than e^x: what x has beside a whole number is
// exact.
template <class U>
INLINE Vec<float> exp2_(const Vec<float>& x) {
#if FA3NPU_AVX512
  const Vec<float> n = _mm512_roundscale_ps(x, 0), r = x - n;
#else
  const auto in_range = (x >= -126.0f) & (x < 127.5f);
  const Vec<float> bounded = in_range ? x : Vec<float>{};
  const Vec<float> n = (bounded + kWhole) - kWhole, r = bounded - n;
#endif
  Vec<float> p;
  if constexpr (kDepth<U> == 2) {
    p = multiply_add(r, splat(1.32647280e-3f), splat(9.67151327e-3f));
    p = multiply_add(p, r, splat(5.55073375e-2f));
    p = multiply_add(p, r, splat(2.40222421e-1f));
    p = multiply_add(p, r, splat(6.93146978e-1f));
  } else {
    p = multiply_add(r, splat(1.53533594e-4f), splat(1.33988750e-3f));
    p = multiply_add(p, r, splat(9.61843737e-3f));
    p = multiply_add(p, r, splat(5.55033247e-2f));
    p = multiply_add(p, r, splat(2.40226479e-1f));
    p = multiply_add(p, r, splat(6.93147203e-1f));
  }
  p = multiply_add(p, r, splat(1.0f));
#if FA3NPU_AVX512
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  const Vec<float> outside = x > 0.0f ? Vec<float>{} + kInf : (x < 0.0f ? Vec<float>{} : x);
  return in_range ? p * power_of_2(n) : outside;
#endif
}

template <class U>
INLINE Vec<double> exp2_(const Vec<double>& x) {
  Vec<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

// The vector's own, so that one row of one key has the same bits.
template <class U>
INLINE float exp2_(float x) {
  return exp2_<U>(splat(x))[0];
}
template <class U>
INLINE double exp2_(double x) {
  return exp2_<U>(splat(x))[0];
}

// softcap * tanh(x / softcap), tanh(y) = (e^2y - 1) / (e^2y + 1) with both from the same e^r - 1:
// at most 6 ulp
INLINE Vec<float> softcapped(const Vec<float>& x, float softcap) {
  const Vec<float> y = x * (2.0f / softcap);
  const Vec<float> bounded = y > 40.0f ? splat(40.0f) : (y > -40.0f ? y : splat(-40.0f));
  const Reduced e = reduced(bounded);
  const Vec<float> power = power_of_2(e.n), q = multiply_add(exp_tail(e.r), e.r * e.r, e.r);
  const Vec<float> less_one = multiply_add(q, power, power - 1.0f);
  const Vec<float> capped = softcap * less_one / (less_one + 2.0f);
  return x == x ? capped : x;
}
INLINE Vec<double> softcapped(const Vec<double>& x, double softcap) {
  Vec<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = softcap * std::tanh(x[i] / softcap);
  return y;
}

// ---- a square of lanes x lanes, transposed ----

#if FA3NPU_AVX512
INLINE Vec<float> lanes_of(const Vec<float>& a, const Vec<float>& b, const __m512i& which) {
  return _mm512_permutex2var_ps(a, which, b);
}
INLINE Vec<double> lanes_of(const Vec<double>& a, const Vec<double>& b, const __m512i& which) {
  return _mm512_permutex2var_pd(a, which, b);
}

// Which lanes of two vectors make the first and the second one after quarters of size `half` swap.
template <class U, class Index>
struct Swaps {
  static constexpr int L = kLanes<U>;
  alignas(64) Index first[L], second[L];
  constexpr explicit Swaps(int half) : first(), second() {
    for (int j = 0; j < L; ++j) {
      first[j] = j & half ? L + j - half : j;
      second[j] = j & half ? L + j : j + half;
    }
  }
};

template <int Half, class U>
INLINE void swap_quarters(Vec<U>& x, Vec<U>& y) {
  typedef std::conditional_t<sizeof(U) == 4, int32_t, int64_t> Index;
  static constexpr Swaps<U, Index> swaps(Half);
  const Vec<U> a = x, b = y;
  x = lanes_of(a, b, _mm512_load_si512(swaps.first));
  y = lanes_of(a, b, _mm512_load_si512(swaps.second));
}
#elif FA3NPU_BYTES == 32
template <int Half, class U>
INLINE void swap_quarters(Vec<U>& x, Vec<U>& y) {
  const Vec<U> a = x, b = y;
  if constexpr (Half * sizeof(U) == 16) {
    x = (Vec<U>)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
    y = (Vec<U>)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
  } else if constexpr (Half * sizeof(U) == 8) {
    x = (Vec<U>)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
    y = (Vec<U>)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
  } else {
    x = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
    y = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  }
}
#endif

#if FA3NPU_BYTES >= 32
template <class U, int Half>
INLINE void swap_all(Vec<U>* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<U>; ++i)
    if (!(i & Half)) swap_quarters<Half, U>(x[i], x[i + Half]);
  if constexpr (Half > 1) swap_all<U, Half / 2>(x);
}

template <class U>
INLINE void transpose_square(Vec<U>* x) {
  swap_all<U, kLanes<U> / 2>(x);
}
#else
template <class U>
INLINE void transpose_square(Vec<U>* x) {
  constexpr int L = kLanes<U>;
  Vec<U> y[L];
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) y[j][i] = x[i][j];
  for (int i = 0; i < L; ++i) x[i] = y[i];
}
#endif

#if FA3NPU_AVX512
// By 16 bytes first, of four rows each, then whole: unpacking is cheaper than a choice of lanes.
INLINE void transpose_floats(Vec<float>* x) {
  __m512 y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 ab_low = _mm512_unpacklo_ps(x[i], x[i + 1]);
    const __m512 ab_high = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const __m512 cd_low = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
    const __m512 cd_high = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(ab_low, cd_low, 0x44);
    y[i + 1] = _mm512_shuffle_ps(ab_low, cd_low, 0xee);
    y[i + 2] = _mm512_shuffle_ps(ab_high, cd_high, 0x44);
    y[i + 3] = _mm512_shuffle_ps(ab_high, cd_high, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 ab_even = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
    const __m512 cd_odd = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
}
template <>
INLINE void transpose_square<float>(Vec<float>* x) {
  transpose_floats(x);
}
#if FA3NPU_BFLOAT16
template <>
INLINE void transpose_square<Pair>(Vec<Pair>* x) {
  Vec<float> y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) y[i] = (Vec<float>)x[i];
  transpose_floats(y);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = (Vec<Pair>)y[i];
}
#endif
#endif

#if FA3NPU_BYTES == 32
// Both halves of four rows, each on its own.
INLINE void transpose_halves(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
  const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
  b = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
  c = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
  d = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}

template <>
INLINE void transpose_square<float>(Vec<float>* x) {
  __m256 y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // the halves change places
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  transpose_halves(y[0], y[1], y[2], y[3]);
  transpose_halves(y[4], y[5], y[6], y[7]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = y[i];
}
#endif

// Rows load(0), load(1), ... become the columns of `to`.
template <class U, class Load>
INLINE void transpose(const Load& load, U* to, int64_t ld) {
  constexpr int L = kLanes<U>;
  Vec<U> x[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) x[i] = load(i);
  transpose_square<U>(x);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(to + i * ld, x[i]);
}

// ---- reductions: of all lanes of x[i], in a fixed tree that begins with lanes half a vector
// apart; of N vectors, a power of two, the results lie in every L / N th lane ----

#if FA3NPU_BYTES >= 32
template <class T, int Half, int N, class F>
INLINE void fold(Vec<T>* x, const F& combine) {
  constexpr int kept = N > 1 ? N / 2 : 1;
#pragma GCC unroll 16
  for (int i = 0; i < kept; ++i) {
    Vec<T> y = x[N - kept + i];
    swap_quarters<Half, T>(x[i], y);
    x[i] = combine(x[i], y);
  }
  if constexpr (Half > 1) fold<T, Half / 2, kept>(x, combine);
}
#endif

template <class T, int N = kLanes<T>, class F>
INLINE Vec<T> reduce(const Vec<T>* x, const F& combine) {
  constexpr int L = kLanes<T>;
#if FA3NPU_BYTES >= 32
  Vec<T> y[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) y[i] = x[i];
  fold<T, L / 2, N>(y, combine);
  return y[0];
#else
  T squares[L * L] __attribute__((aligned(64)));
  transpose<T>([&](int64_t i) { return x[i * N / L]; }, squares, L);
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      store(squares + i * L, combine(vec(squares + i * L), vec(squares + (i + half) * L)));
  return vec(squares);
#endif
}

template <class T, int N = kLanes<T>>
INLINE Vec<T> sums(const Vec<T>* x) {
  return reduce<T, N>(x, [](const auto& a, const auto& b) INLINE_LAMBDA { return a + b; });
}

template <class T>
INLINE Vec<T> maxima(const Vec<T>* x) {
  return reduce<T>(x, [](const auto& a, const auto& b) INLINE_LAMBDA { return a > b ? a : b; });
}

template <class T>
INLINE T greater(T a, T b) {
  return b > a ? b : a;
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
