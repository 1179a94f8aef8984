// The primitives of an instruction set: vectors as wide as a register, exp, reductions, transposes,
// the multiply-add of products. Everything else is written against them.

// No include guard and no includes: see tile_*.cpp.

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

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
  typedef float type __attribute__((vector_size(FA3NPU_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(FA3NPU_BYTES), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(FA3NPU_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(FA3NPU_BYTES), aligned(8), may_alias));
};
template <>
struct Vector<Pair> {
  typedef typename Vector<float>::bits type;
  typedef type bits;
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int64_t kLanes = FA3NPU_BYTES / sizeof(T);

template <class T>
INLINE Vec<T>& vec(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
INLINE const Vec<T>& vec(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
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

// acc += y * x, every lane on its own; a Pair adds two products.
template <class T>
INLINE void multiply_add(Vec<T>& acc, T y, const Vec<T>& x) {
  acc += y * x;
}
#if FA3NPU_BFLOAT16
INLINE void multiply_add(Vec<float>& acc, Pair y, const Vec<Pair>& x) {
  int32_t both;
  __builtin_memcpy(&both, &y, 4);
  acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)x);
}
#endif

// ---- exp: at most 1.2 ulp up to 88 (0.9 with FMA), exact at 0, 0 below the smallest normal; NaN
// stays NaN ----

// x = n log(2) + r, n whole and |r| <= 0.35, for -87.3 <= x <= 88.3
struct Reduced {
  Vec<float> n, r;
};

INLINE Reduced reduced(const Vec<float>& x) {
#if FA3NPU_AVX512
  const Vec<float> n = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504088896341f + magic) - magic;
#endif
  return {n, (x - n * 0.693359375f) - n * -2.12194440e-4f};
}

INLINE Vec<float> exp_tail(const Vec<float>& r) {  // e^r = 1 + r + r^2 exp_tail(r)
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

INLINE Vec<float> power_of_2(const Vec<float>& n) {
  typedef typename Vector<float>::bits Bits;
  const Bits exponent = (__builtin_convertvector(n, Bits) + 127) << 23;
  return reinterpret_cast<const Vec<float>&>(exponent);
}

INLINE Vec<float> exp_(const Vec<float>& x) {
#if FA3NPU_AVX512
  const Reduced e = reduced(x);
  const Vec<float> y = (exp_tail(e.r) * e.r + 1.0f) * e.r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, y, e.n);
#else
  const auto in_range = (x >= -87.33654f) & (x <= 88.37626f);
  const Reduced e = reduced(in_range ? x : Vec<float>{});
  const Vec<float> y = (exp_tail(e.r) * e.r + 1.0f) * e.r + 1.0f;
  const Vec<float> outside = x > 0.0f ? Vec<float>{} + kInf : (x < 0.0f ? Vec<float>{} : x);
  return in_range ? y * power_of_2(e.n) : outside;
#endif
}

INLINE Vec<double> exp_(const Vec<double>& x) {
  Vec<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

template <class T>
INLINE T exp1(T x) {
  return exp_(Vec<T>{} + x)[0];  // the vector's own, so that one row of one key has the same bits
}

// softcap * tanh(x / softcap), tanh(y) = (e^2y - 1) / (e^2y + 1) with both from the same e^r - 1:
// at most 6 ulp
INLINE Vec<float> softcapped(const Vec<float>& x, float softcap) {
  const Vec<float> y = x * (2.0f / softcap);
  const Vec<float> bounded =
      y > 40.0f ? Vec<float>{} + 40.0f : (y < -40.0f ? Vec<float>{} - 40.0f : y);
  const Reduced e = reduced(bounded);
  const Vec<float> power = power_of_2(e.n), q = exp_tail(e.r) * (e.r * e.r) + e.r;
  const Vec<float> less_one = q * power + (power - 1.0f);
  return softcap * less_one / (less_one + 2.0f);
}
INLINE Vec<double> softcapped(const Vec<double>& x, double softcap) {
  Vec<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = softcap * std::tanh(x[i] / softcap);
  return y;
}

// ---- a square of lanes x lanes, transposed ----

#if FA3NPU_AVX512
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

template <class U, int Half>
INLINE void swap_quarters(Vec<U>* x) {
  typedef typename Vector<U>::bits Bits;
  typedef std::conditional_t<sizeof(U) == 4, int32_t, int64_t> Index;
  static constexpr Swaps<U, Index> swaps(Half);
  const Bits first = reinterpret_cast<const Bits&>(swaps.first);
  const Bits second = reinterpret_cast<const Bits&>(swaps.second);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<U>; ++i) {
    if (i & Half) continue;
    const Vec<U> a = x[i], b = x[i + Half];
    x[i] = __builtin_shuffle(a, b, first);
    x[i + Half] = __builtin_shuffle(a, b, second);
  }
}
#endif

// Rows load(0), load(1), ... become the columns of `to`.
template <class U, class Load>
INLINE void transpose(const Load& load, U* to, int64_t ld) {
  constexpr int L = kLanes<U>;
  Vec<U> x[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) x[i] = load(i);
#if FA3NPU_AVX512
  if constexpr (L == 16) swap_quarters<U, 8>(x);
  swap_quarters<U, 4>(x);
  swap_quarters<U, 2>(x);
  swap_quarters<U, 1>(x);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) vec(to + i * ld) = x[i];
#else
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) to[j * ld + i] = x[i][j];
#endif
}

// ---- reductions: lane i of the result is of all lanes of x[i], in a fixed tree ----

template <class T, class F>
INLINE Vec<T> reduce(const Vec<T>* x, const F& combine) {
  constexpr int L = kLanes<T>;
  T squares[L * L] __attribute__((aligned(64)));
  transpose<T>([&](int64_t i) { return x[i]; }, squares, L);
#pragma GCC unroll 16
  for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      vec(squares + i * L) = combine(vec(squares + i * L), vec(squares + (i + half) * L));
  return vec(squares);
}

template <class T>
INLINE Vec<T> sums(const Vec<T>* x) {
  return reduce<T>(x, [](const auto& a, const auto& b) { return a + b; });
}

template <class T>
INLINE Vec<T> maxima(const Vec<T>* x) {
  return reduce<T>(x, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

template <class T>
INLINE T greater(T a, T b) {
  return b > a ? b : a;
}
