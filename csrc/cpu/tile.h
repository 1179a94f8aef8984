// The attention loop over one tile of query rows, and its gradient. tile_*.cpp compile this file
// once per instruction set, each in its own namespace; the vectors are the compiler's, as wide as a
// register.
//
// Bits: an element of a product is always summed in the order of its index, a row's softmax never
// mixes with another row's, and masked keys add exact zeros. So a row's result does not depend on
// the tile, the batch or the thread that computed it.

// No include guard and no includes: see tile_*.cpp.

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
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int64_t kLanes = FA3NPU_BYTES / sizeof(T);

#define INLINE inline __attribute__((always_inline))

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

// ---- exp: at most 2 ulp up to 88, exact at 0, 0 below the smallest normal; NaN stays NaN ----

// e^x = 2^n (1 + q), |q| <= 0.42, for -87.3 <= x <= 88.3
struct Exponential {
  Vec<float> q, power;
};

INLINE Exponential exponential(const Vec<float>& x) {
  typedef typename Vector<float>::bits Bits;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504088896341f + magic) - magic;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Bits exponent = (__builtin_convertvector(n, Bits) + 127) << 23;
  return {p * (r * r) + r, reinterpret_cast<const Vec<float>&>(exponent)};
}

INLINE Vec<float> exp_(const Vec<float>& x) {
  const auto in_range = (x >= -87.33654f) & (x <= 88.37626f);
  const Exponential e = exponential(in_range ? x : Vec<float>{});
  const Vec<float> outside = x > 0.0f ? Vec<float>{} + kInf : (x < 0.0f ? Vec<float>{} : x);
  return in_range ? (e.q + 1.0f) * e.power : outside;
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

// softcap * tanh(x / softcap), tanh(y) = (e^2y - 1) / (e^2y + 1) with both from the same q
INLINE Vec<float> softcapped(const Vec<float>& x, float softcap) {
  const Vec<float> y = x * (2.0f / softcap);
  const Vec<float> bounded =
      y > 40.0f ? Vec<float>{} + 40.0f : (y < -40.0f ? Vec<float>{} - 40.0f : y);
  const Exponential e = exponential(bounded);
  const Vec<float> less_one = e.q * e.power + (e.power - 1.0f);
  return softcap * less_one / (less_one + 2.0f);
}
INLINE Vec<double> softcapped(const Vec<double>& x, double softcap) {
  Vec<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = softcap * std::tanh(x[i] / softcap);
  return y;
}

// Of all lanes, in a fixed tree.
template <class T, class F>
INLINE T reduce(Vec<T> x, const F& combine) {
#if FA3NPU_SHUFFLES
  typedef typename Vector<T>::bits Bits;
  Bits lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    x = combine(x, __builtin_shuffle(x, (lane + half) & (kLanes<T> - 1)));
  return x[0];
#else
  T y[kLanes<T>];
  vec(y) = x;
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) y[i] = combine(y[i], y[i + half]);
  return y[0];
#endif
}

template <class T>
INLINE T sum(const Vec<T>& x) {
  return reduce<T>(x, [](auto a, auto b) { return a + b; });
}

template <class T>
INLINE T max(const Vec<T>& x) {
  return reduce<T>(x, [](auto a, auto b) { return a > b ? a : b; });
}

template <class T>
INLINE T greater(T a, T b) {
  return b > a ? b : a;
}

// ---- C (+)= A B: the one product ----

template <class T, int R, int C, bool SkipZero>
INLINE void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b,
                          int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  Vec<T> acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i)
      acc[r][i] = accumulate ? vec(c + r * ldc + i * kLanes<T>) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> x[C];
    for (int i = 0; i < C; ++i) x[i] = vec(b + k * ldb + i * kLanes<T>);
    for (int r = 0; r < R; ++r) {
      const T y = a[r * a_row + k * a_col];
      if (SkipZero && y == T(0)) continue;
      for (int i = 0; i < C; ++i) acc[r][i] += y * x[i];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) vec(c + r * ldc + i * kLanes<T>) = acc[r][i];
}

template <class T, int R, int C, bool SkipZero>
INLINE void product_rows(int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col,
                         const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  int64_t n = 0;
  for (; n + C * kLanes<T> <= columns; n += C * kLanes<T>)
    product_block<T, R, C, SkipZero>(depth, a, a_row, a_col, b + n, ldb, c + n, ldc, accumulate);
  for (; n < columns; n += kLanes<T>)
    product_block<T, R, 1, SkipZero>(depth, a, a_row, a_col, b + n, ldb, c + n, ldc, accumulate);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]. A is read at a_row and a_col strides (so
// it may be a transpose); columns is a multiple of the lanes. With skip_zero an exact zero of A
// removes what it would multiply: a NaN behind a masked key must not reach the row.
template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_col,
             const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate, bool skip_zero) {
  int64_t r = 0;
  if (skip_zero) {
    for (; r < rows; ++r)
      product_rows<T, 1, 1, true>(columns, depth, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc,
                                  ldc, accumulate);
    return;
  }
  for (; r + FA3NPU_ROWS <= rows; r += FA3NPU_ROWS)
    product_rows<T, FA3NPU_ROWS, FA3NPU_VECTORS, false>(columns, depth, a + r * a_row, a_row, a_col,
                                                        b, ldb, c + r * ldc, ldc, accumulate);
  const auto rest = [&](auto n) {  // together, so that B is read once
    product_rows<T, decltype(n)::value, FA3NPU_VECTORS, false>(
        columns, depth, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  };
  switch (rows - r) {
    case 1:
      return rest(std::integral_constant<int, 1>());
    case 2:
      return rest(std::integral_constant<int, 2>());
    case 3:
      return rest(std::integral_constant<int, 3>());
    case 4:
      return rest(std::integral_constant<int, 4>());
    case 5:
      return rest(std::integral_constant<int, 5>());
  }
}

// ---- loads and stores ----

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

// A vector of T from as many elements of a narrower type.
struct FromBFloat16 {
  static constexpr int64_t kBytes = 2;
  typedef short Narrow __attribute__((vector_size(FA3NPU_BYTES / 2), aligned(2), may_alias));
  typedef int Wide __attribute__((vector_size(FA3NPU_BYTES)));
  INLINE static Vec<float> vector(const char* from) {
    const Narrow x = *reinterpret_cast<const Narrow*>(from);
#if FA3NPU_SHUFFLES
    const Wide wide = __builtin_ia32_pmovzxwd512_mask(x, Wide{}, -1) << 16;  // gcc 12 needs three
#else
    const Wide wide = __builtin_convertvector(x, Wide) << 16;
#endif
    return reinterpret_cast<const Vec<float>&>(wide);
  }
};
struct FromHalf {
  static constexpr int64_t kBytes = 2;
  typedef short Narrow __attribute__((vector_size(FA3NPU_BYTES / 2), aligned(2), may_alias));
  INLINE static Vec<float> vector(const char* from) {
    const Narrow half = *reinterpret_cast<const Narrow*>(from);
#if FA3NPU_SHUFFLES
    typedef float Plain __attribute__((vector_size(FA3NPU_BYTES)));
    return __builtin_ia32_vcvtph2ps512_mask(half, Plain{}, -1, 4);
#else
    Vec<float> x;
    for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = half_to_float(uint16_t(half[i]));
    return x;
#endif
  }
};
struct FromFloat {
  static constexpr int64_t kBytes = 4;
  INLINE static Vec<float> vector(const char* from) {
    return vec(reinterpret_cast<const float*>(from));
  }
};

template <class T>
void load_row(const char* from, ScalarType dtype, int64_t n, T* to) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
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

template <class T>
void store_row(const T* from, T scale, ScalarType dtype, int64_t n, char* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  switch (dtype) {
    case ScalarType::BFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_bfloat16(float(from[i] * scale));
      break;
    case ScalarType::Half:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_half(float(from[i] * scale));
      break;
    case ScalarType::Float:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(to)[i] = float(from[i] * scale);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<double*>(to)[i] = from[i] * scale;
  }
}

INLINE void prefetch(const char* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  Vec<T> zeros[4]{};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>)
    for (int64_t k = 0; k < 4; ++k) zeros[k] += vec(x + i + k * kLanes<T>) * T(0);
  for (; i < n; i += kLanes<T>) zeros[0] += vec(x + i) * T(0);
  return sum<T>(zeros[0] + zeros[1] + (zeros[2] + zeros[3])) == T(0);
}

// ---- a square of lanes x lanes, transposed ----

#if FA3NPU_SHUFFLES
// Which lanes of two vectors make the first and the second one after quarters of size `half` swap.
template <class T, class Index>
struct Swaps {
  static constexpr int L = kLanes<T>;
  alignas(64) Index first[L], second[L];
  constexpr explicit Swaps(int half) : first(), second() {
    for (int j = 0; j < L; ++j) {
      first[j] = j & half ? L + j - half : j;
      second[j] = j & half ? L + j : j + half;
    }
  }
};

template <class T, int Half>
INLINE void swap_quarters(Vec<T>* x) {
  typedef typename Vector<T>::bits Bits;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  static constexpr Swaps<T, Index> swaps(Half);
  const Bits first = reinterpret_cast<const Bits&>(swaps.first);
  const Bits second = reinterpret_cast<const Bits&>(swaps.second);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & Half) continue;
    const Vec<T> a = x[i], b = x[i + Half];
    x[i] = __builtin_shuffle(a, b, first);
    x[i + Half] = __builtin_shuffle(a, b, second);
  }
}
#endif

// Rows load(0), load(1), ... become the columns of `to`.
template <class T, class Load>
INLINE void transpose(const Load& load, T* to, int64_t ld) {
  constexpr int L = kLanes<T>;
  Vec<T> x[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) x[i] = load(i);
#if FA3NPU_SHUFFLES
  if constexpr (L == 16) swap_quarters<T, 8>(x);
  swap_quarters<T, 4>(x);
  swap_quarters<T, 2>(x);
  swap_quarters<T, 1>(x);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) vec(to + i * ld) = x[i];
#else
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) to[j * ld + i] = x[i][j];
#endif
}

// ---- tiles in scratch memory ----

// Cuts scratch memory into arrays, each on its own cache lines.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(next);
    next += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A block of up to kKeyBlock rows of K or V, as rows[j][ld] and transposed[column][kKeyBlock],
// either of them null where it is not needed. Rows past `count` and columns past `width` are zero.
template <class T>
struct KeyTile {
  T *rows, *transposed, *strip;
  int64_t width, ld;

  KeyTile(Arena& arena, int64_t width, bool with_rows, bool with_transposed)
      : rows(with_rows ? arena.take<T>(kKeyBlock * padded<T>(width)) : nullptr),
        transposed(with_transposed ? arena.take<T>(kKeyBlock * padded<T>(width)) : nullptr),
        strip(with_rows ? nullptr : arena.take<T>(kLanes<T> * padded<T>(width))),
        width(width),
        ld(padded<T>(width)) {}

  void load(const Attention& a, const Rows& cache, const Sequence& s, int64_t first, int64_t count,
            int64_t head) {
    const auto by_row = [&](const char* from, T* to) {
      load_row(from, cache.dtype, width, to);
      for (int64_t c = width; c < ld; ++c) to[c] = T(0);
    };
    if constexpr (sizeof(T) == 4) {
      const bool whole = width == ld;
      if (whole && cache.dtype == ScalarType::BFloat16)
        return load_as<FromBFloat16>(a, cache, s, first, count, head);
      if (whole && cache.dtype == ScalarType::Half)
        return load_as<FromHalf>(a, cache, s, first, count, head);
      if (whole && cache.dtype == ScalarType::Float)
        return load_as<FromFloat>(a, cache, s, first, count, head);
    }
    load_rows(a, cache, s, first, count, head, by_row);
  }

  template <class From>
  void load_as(const Attention& a, const Rows& cache, const Sequence& s, int64_t first,
               int64_t count, int64_t head) {
    if (!rows) return load_transposed<From>(a, cache, s, first, count, head);
    load_rows(a, cache, s, first, count, head, [this](const char* from, T* to) {
      for (int64_t c = 0; c < ld; c += kLanes<T>)
        vec(to + c) = From::vector(from + c * From::kBytes);
    });
  }

  template <class LoadRow>
  INLINE void load_rows(const Attention& a, const Rows& cache, const Sequence& s, int64_t first,
                        int64_t count, int64_t head, const LoadRow& load_row) {
    for (int64_t j = 0; j < kKeyBlock; j += kLanes<T>) {
      T* to = rows ? rows + j * ld : strip;
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        T* row = to + i * ld;
        if (j + i < count)
          load_row(a.key_row(cache, s, first + j + i, head), row);
        else
          fill<T>(row, ld, T(0));
        const int64_t later = first + j + i + kKeyBlock;  // rows are too short for the hardware's
        if (later < s.k_len) prefetch(a.key_row(cache, s, later, head), cache.element * width);
      }
      for (int64_t c = 0; transposed && c < ld; c += kLanes<T>)
        transpose<T>([&](int64_t i) { return vec(to + i * ld + c); },
                     transposed + c * kKeyBlock + j, kKeyBlock);
    }
  }

  // Without the detour over `strip`.
  template <class From>
  void load_transposed(const Attention& a, const Rows& cache, const Sequence& s, int64_t first,
                       int64_t count, int64_t head) {
    static const char zeros[kMaxHeadDim * 4] = {};
    for (int64_t j = 0; j < kKeyBlock; j += kLanes<T>) {
      const char* from[kLanes<T>];
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        from[i] = j + i < count ? a.key_row(cache, s, first + j + i, head) : zeros;
        const int64_t later = first + j + i + kKeyBlock;
        if (later < s.k_len) prefetch(a.key_row(cache, s, later, head), cache.element * width);
      }
      for (int64_t c = 0; c < ld; c += kLanes<T>)
        transpose<T>([&](int64_t i) { return From::vector(from[i] + c * From::kBytes); },
                     transposed + c * kKeyBlock + j, kKeyBlock);
    }
  }

  bool finite() const { return all_finite(rows, kKeyBlock * ld); }
};

// What the softmax of a tile's rows needs: who they are and which keys they see.
template <class T>
struct QueryTile {
  const Attention& a;
  const Sequence& s;
  int64_t sequence, head_k, first, rows;
  T *q, *qv;  // q[r][ld], zero past headdim; qv[r][headdim_v]
  int64_t ld;
  int64_t* position;
  KeyRange* keys;
  T* slope;

  QueryTile(const Attention& a, const RowTile& t, Arena& arena)
      : a(a),
        s(a.sequences[t.sequence]),
        sequence(t.sequence),
        head_k(t.head_k),
        first(t.first),
        rows(t.rows),
        ld(padded<T>(a.headdim)) {
    q = arena.take<T>(a.row_tile * ld);
    qv = a.qv.data ? arena.take<T>(a.row_tile * a.headdim_v) : nullptr;
    position = arena.take<int64_t>(a.row_tile);
    keys = arena.take<KeyRange>(a.row_tile);
    slope = arena.take<T>(a.row_tile);
    load();
  }

  int64_t head(int64_t r) const { return head_k * a.group() + (first + r) % a.group(); }

  void load() {
    const bool fp8 = a.q.dtype == ScalarType::Float8_e4m3fn;
    const T q_scale = fp8 ? a.q_descale.get(sequence, head_k, 1) : 1;
    const T k_scale = fp8 ? a.k_descale.get(sequence, head_k, 1) : 1;
    const T v_scale = fp8 ? a.v_descale.get(sequence, head_k, 1) : 1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (first + r) / a.group();
      position[r] = i;
      keys[r] = a.visible(s, i);
      slope[r] = a.alibi_slopes.get(sequence, head(r), 0);
      T* row = q + r * ld;
      load_row(a.q.at(s.q_batch, s.q_begin + i, head(r)), a.q.dtype, a.headdim, row);
      for (int64_t c = 0; fp8 && c < a.headdim; ++c) row[c] *= q_scale * k_scale;
      for (int64_t c = a.headdim; c < ld; ++c) row[c] = T(0);
      if (qv == nullptr) continue;
      row = qv + r * a.headdim_v;
      load_row(a.qv.at(s.q_batch, s.q_begin + i, head(r)), a.qv.dtype, a.headdim_v, row);
      for (int64_t c = 0; fp8 && c < a.headdim_v; ++c) row[c] *= q_scale * v_scale;
    }
  }

  // scores[r][kKeyBlock] = q k^T + qv v^T, not yet scaled
  void scores(const KeyTile<T>& k, const KeyTile<T>& v, T* to) const {
    product<T>(rows, kKeyBlock, a.headdim, q, ld, 1, k.transposed, kKeyBlock, to, kKeyBlock, false,
               false);
    if (qv)
      product<T>(rows, kKeyBlock, a.headdim_v, qv, a.headdim_v, 1, v.transposed, kKeyBlock, to,
                 kKeyBlock, true, false);
  }

  // One vector of row r's scores at keys block + lane...: scaled, capped, biased. Masked keys are
  // -inf. `capped` is the score before the bias, which the softcap's gradient needs.
  INLINE Vec<T> logits(int64_t r, int64_t block, int64_t lane, const Vec<T>& score,
                       Vec<T>* capped = nullptr) const {
    Vec<T> index;
    for (int64_t i = 0; i < kLanes<T>; ++i) index[i] = T(lane + i);
    Vec<T> x = score * T(a.softmax_scale);
    if (a.softcap > 0) x = softcapped(x, T(a.softcap));
    if (capped) *capped = x;
    if (slope[r] != 0) {
      const Vec<T> distance = T(position[r] + s.k_len - s.q_len - block) - index;
      x -= slope[r] * (distance < T(0) ? -distance : distance);
    }
    const T begin = T(clamp(keys[r].begin - block, 0, kKeyBlock));
    const T end = T(clamp(keys[r].end - block, 0, kKeyBlock));
    return ((index >= begin) & (index < end)) ? x : Vec<T>{} - T(kInf);
  }

  // Whether row r's logits at the keys of the block are its scores times softmax_scale.
  bool plain(int64_t r, int64_t block) const {
    return keys[r].begin <= block && keys[r].end >= block + kKeyBlock && a.softcap <= 0 &&
           slope[r] == 0;
  }

  bool sees(int64_t block) const {
    return keys[0].begin < block + kKeyBlock && keys[rows - 1].end > block;
  }
};

// ---- forward ----

// A partial result of a row tile: maximum, sum and unscaled output of each row.
template <class T>
struct State {
  T *maximum, *sum, *out;
  int64_t ld;
  State(const Attention& a, char* at) : ld(padded<T>(a.headdim_v)) {
    Arena arena{at};
    maximum = arena.take<T>(a.row_tile);
    sum = arena.take<T>(a.row_tile);
    out = arena.take<T>(a.row_tile * ld);
  }
};

template <class T>
void empty_state_(const Attention& a, char* at) {
  const State<T> state(a, at);
  fill<T>(state.maximum, a.row_tile, -T(kInf));
  fill<T>(state.sum, a.row_tile, T(0));
  fill<T>(state.out, a.row_tile * state.ld, T(0));
}

// One step of the online softmax for row r: turns its scores into probabilities relative to the new
// maximum and rescales what was summed before. A block that the row does not see changes nothing.
template <class T>
void softmax_step(const QueryTile<T>& q, int64_t r, int64_t block, T* scores,
                  const State<T>& state) {
  T* row = scores + r * kKeyBlock;
  Vec<T> top = Vec<T>{} - T(kInf);
  if (q.plain(r, block)) {
    for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes<T>) {
      const Vec<T> x = vec(row + lane) * T(q.a.softmax_scale);
      vec(row + lane) = x;
      top = x > top ? x : top;
    }
  } else {
    for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes<T>) {
      const Vec<T> x = q.logits(r, block, lane, vec(row + lane));
      vec(row + lane) = x;
      top = x > top ? x : top;
    }
  }
  const T before = state.maximum[r];
  const T maximum = greater(before, max<T>(top));
  const T base = maximum == -T(kInf) ? T(0) : maximum;  // -inf - -inf would be NaN
  Vec<T> total{};
  for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes<T>) {
    const Vec<T> p = exp_(vec(row + lane) - base);
    vec(row + lane) = p;
    total += p;
  }
  if (maximum == before) {  // alpha is 1
    state.sum[r] += sum<T>(total);
    return;
  }
  const T alpha = exp1(before - base);
  state.maximum[r] = maximum;
  state.sum[r] = state.sum[r] * alpha + sum<T>(total);
  for (int64_t c = 0; c < state.ld; c += kLanes<T>) vec(state.out + r * state.ld + c) *= alpha;
}

// `count` tiles of one sequence and the same rows, of neighbouring KV heads: block by block, so
// that the heads of a token, which lie together, are read together.
template <class T>
void forward_chunk_(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                    char* states, char* scratch) {
  Arena arena{scratch};
  auto* q = reinterpret_cast<QueryTile<T>*>(arena.take<char>(count * sizeof(QueryTile<T>)));
  for (int64_t i = 0; i < count; ++i) {
    new (q + i) QueryTile<T>(a, tiles[i], arena);
    empty_state_<T>(a, states + i * state_bytes(a));
  }
  KeyTile<T> k(arena, a.headdim, false, true);
  KeyTile<T> v(arena, a.headdim_v, true, a.qv.data != nullptr);
  T* scores = arena.take<T>(a.row_tile * kKeyBlock);

  const int64_t end = least((chunk + 1) * kChunk, q->s.k_len);
  for (int64_t block = chunk * kChunk; block < end; block += kKeyBlock) {
    if (!q->sees(block)) continue;
    const int64_t keys = least(kKeyBlock, end - block);
    for (int64_t i = 0; i < count; ++i) {
      const State<T> state(a, states + i * state_bytes(a));
      k.load(a, a.k, q->s, block, keys, tiles[i].head_k);
      v.load(a, a.v, q->s, block, keys, tiles[i].head_k);
      q[i].scores(k, v, scores);
      for (int64_t r = 0; r < q->rows; ++r) softmax_step(q[i], r, block, scores, state);
      product<T>(q->rows, state.ld, keys, scores, kKeyBlock, 1, v.rows, v.ld, state.out, state.ld,
                 true, !v.finite());
    }
  }
}

template <class T>
void merge_state_(const Attention& a, const RowTile& t, char* into_, const char* from_) {
  const State<T> into(a, into_), from(a, const_cast<char*>(from_));
  for (int64_t r = 0; r < t.rows; ++r) {
    const T maximum = greater(into.maximum[r], from.maximum[r]);
    const T base = maximum == -T(kInf) ? T(0) : maximum;
    const T alpha = exp1(into.maximum[r] - base), beta = exp1(from.maximum[r] - base);
    into.maximum[r] = maximum;
    into.sum[r] = into.sum[r] * alpha + from.sum[r] * beta;
    for (int64_t c = r * into.ld; c < (r + 1) * into.ld; c += kLanes<T>)
      vec(into.out + c) = vec(into.out + c) * alpha + vec(from.out + c) * beta;
  }
}

template <class T>
void finish_(const Attention& a, const RowTile& t, const char* at) {
  const State<T> state(a, const_cast<char*>(at));
  const Sequence& s = a.sequences[t.sequence];
  const bool fp8 = a.v.dtype == ScalarType::Float8_e4m3fn;
  const T v_scale = fp8 ? a.v_descale.get(t.sequence, t.head_k, 1) : 1;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = (t.first + r) / a.group();
    const int64_t head = t.head_k * a.group() + (t.first + r) % a.group();
    T maximum = state.maximum[r], total = state.sum[r], scale = v_scale;
    const bool sees_nothing = maximum == -T(kInf) && total == T(0);
    if (a.sinks.data && !sees_nothing) {  // the sink is one more key, without a value
      const T sink = a.sinks.get(0, head, 0), base = greater(maximum, sink);
      const T alpha = exp1(maximum - base);
      total = total * alpha + exp1(sink - base);
      scale *= alpha;
      maximum = base;
    }
    scale = sees_nothing ? T(0) : scale / total;
    store_row<T>(state.out + r * state.ld, scale, a.out.dtype, a.headdim_v,
                 a.out.at(s.q_batch, s.q_begin + i, head));
    a.softmax_lse.at(s.q_batch, s.q_begin + i, head) =
        sees_nothing ? -kInf : float(maximum + std::log(total));
  }
}

// ---- backward ----
// P = exp(S - LSE) and dS = P (dP - delta), delta = rowsum(dout out) - dLSE, are computed again in
// both passes, so that each gradient has one owner and no sum depends on a schedule.

template <class T>
struct GradientTile {
  QueryTile<T> q;
  T *dout, *out, *lse, *delta, *p, *ds;
  int64_t width;

  GradientTile(const Attention& a, const RowTile& t, Arena& arena)
      : q(a, t, arena), width(padded<T>(a.headdim_v)) {
    dout = arena.take<T>(a.row_tile * width);
    out = arena.take<T>(a.row_tile * width);
    lse = arena.take<T>(a.row_tile);
    delta = arena.take<T>(a.row_tile);
    p = arena.take<T>(a.row_tile * kKeyBlock);
    ds = arena.take<T>(a.row_tile * kKeyBlock);
  }

  void load_dout() {
    const Attention& a = q.a;
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t i = q.s.q_begin + q.position[r], head = q.head(r);
      T* row = dout + r * width;
      load_row(a.dout.at(q.s.q_batch, i, head), a.dout.dtype, a.headdim_v, row);
      load_row(a.out.at(q.s.q_batch, i, head), a.out.dtype, a.headdim_v, out + r * width);
      for (int64_t c = a.headdim_v; c < width; ++c) row[c] = T(0);
      lse[r] = a.softmax_lse.at(q.s.q_batch, i, head);
      delta[r] = T(0);
    }
    // In the order of dP's sum: where a row sees one key, dP - delta is then exactly 0.
    for (int64_t c = 0; c < a.headdim_v; ++c)
      for (int64_t r = 0; r < q.rows; ++r) delta[r] += dout[r * width + c] * out[r * width + c];
    for (int64_t r = 0; a.dsoftmax_lse.data && r < q.rows; ++r)
      delta[r] -= a.dsoftmax_lse.at(q.s.q_batch, q.s.q_begin + q.position[r], q.head(r));
  }

  // p and ds of the rows against the keys of one block
  void differentiate(int64_t block, const KeyTile<T>& k, const KeyTile<T>& v) {
    const Attention& a = q.a;
    q.scores(k, v, p);
    product<T>(q.rows, kKeyBlock, a.headdim_v, dout, width, 1, v.transposed, kKeyBlock, ds,
               kKeyBlock, false, false);
    for (int64_t r = 0; r < q.rows; ++r) {
      if (lse[r] == -T(kInf)) {  // the row sees nothing
        fill<T>(p + r * kKeyBlock, kKeyBlock, T(0));
        fill<T>(ds + r * kKeyBlock, kKeyBlock, T(0));
        continue;
      }
      for (int64_t lane = 0; lane < kKeyBlock; lane += kLanes<T>) {
        Vec<T>& p_ = vec(p + r * kKeyBlock + lane);
        Vec<T>& ds_ = vec(ds + r * kKeyBlock + lane);
        Vec<T> capped;
        const Vec<T> x = q.logits(r, block, lane, p_, &capped);
        const auto masked = x == -T(kInf);  // not even a NaN of the row reaches a masked key
        p_ = masked ? Vec<T>{} : exp_(x - lse[r]);
        Vec<T> gradient = p_ * (ds_ - delta[r]) * T(a.softmax_scale);
        if (a.softcap > 0) {
          capped /= T(a.softcap);
          gradient *= T(1) - capped * capped;
        }
        ds_ = masked ? Vec<T>{} : gradient;
      }
    }
  }
};

template <class T>
void backward_dq_(const Attention& a, const RowTile& t, char* scratch) {
  Arena arena{scratch};
  GradientTile<T> g(a, t, arena);
  g.load_dout();
  KeyTile<T> k(arena, a.headdim, true, true);
  KeyTile<T> v(arena, a.headdim_v, false, true);
  T* dq = arena.take<T>(a.row_tile * k.ld);
  fill<T>(dq, a.row_tile * k.ld, T(0));
  const Sequence& s = g.q.s;
  for (int64_t block = 0; block < s.k_len; block += kKeyBlock) {
    if (!g.q.sees(block)) continue;
    const int64_t count = least(kKeyBlock, s.k_len - block);
    k.load(a, a.k, s, block, count, t.head_k);
    v.load(a, a.v, s, block, count, t.head_k);
    g.differentiate(block, k, v);
    product<T>(g.q.rows, k.ld, count, g.ds, kKeyBlock, 1, k.rows, k.ld, dq, k.ld, true,
               !k.finite());
  }
  for (int64_t r = 0; r < g.q.rows; ++r)
    store_row<T>(dq + r * k.ld, 1, a.dq.dtype, a.headdim,
                 a.dq.at(s.q_batch, s.q_begin + g.q.position[r], g.q.head(r)));
}

template <class T>
void backward_dkdv_(const Attention& a, int64_t sequence, int64_t head_k, int64_t block,
                    char* scratch) {
  const Sequence& s = a.sequences[sequence];
  const int64_t all_rows = s.q_len * a.group();
  const int64_t count = least(kKeyBlock, s.k_len - block);
  Arena arena{scratch};
  KeyTile<T> k(arena, a.headdim, false, true);
  KeyTile<T> v(arena, a.headdim_v, false, true);
  T* dk = arena.take<T>(kKeyBlock * padded<T>(a.headdim));
  T* dv = arena.take<T>(kKeyBlock * padded<T>(a.headdim_v));
  const int64_t dk_ld = padded<T>(a.headdim), dv_ld = padded<T>(a.headdim_v);
  fill<T>(dk, kKeyBlock * dk_ld, T(0));
  fill<T>(dv, kKeyBlock * dv_ld, T(0));
  k.load(a, a.k, s, block, count, head_k);
  v.load(a, a.v, s, block, count, head_k);

  const Arena tile_arena = arena;
  for (int64_t first = 0; first < all_rows; first += a.row_tile) {
    const RowTile t{sequence, head_k, first, least(a.row_tile, all_rows - first)};
    const KeyRange keys = visible(a, t);
    if (keys.begin >= block + kKeyBlock || keys.end <= block) continue;
    Arena tile = tile_arena;
    GradientTile<T> g(a, t, tile);
    g.load_dout();
    g.differentiate(block, k, v);
    product<T>(count, dv_ld, t.rows, g.p, 1, kKeyBlock, g.dout, dv_ld, dv, dv_ld, true,
               !all_finite(g.dout, t.rows * dv_ld));
    product<T>(count, dk_ld, t.rows, g.ds, 1, kKeyBlock, g.q.q, dk_ld, dk, dk_ld, true,
               !all_finite(g.q.q, t.rows * dk_ld));
  }
  for (int64_t j = 0; j < count; ++j) {
    store_row<T>(dk + j * dk_ld, 1, a.dk.dtype, a.headdim,
                 a.dk.at(s.k_batch, s.k_begin + block + j, head_k));
    store_row<T>(dv + j * dv_ld, 1, a.dv.dtype, a.headdim_v,
                 a.dv.at(s.k_batch, s.k_begin + block + j, head_k));
  }
}

// ---- the table ----

void forward_chunk(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                   char* states, char* scratch) {
  (a.is_double() ? forward_chunk_<double> : forward_chunk_<float>)(a, tiles, count, chunk, states,
                                                                   scratch);
}
void empty_state(const Attention& a, char* state) {
  (a.is_double() ? empty_state_<double> : empty_state_<float>)(a, state);
}
void merge_state(const Attention& a, const RowTile& t, char* into, const char* from) {
  (a.is_double() ? merge_state_<double> : merge_state_<float>)(a, t, into, from);
}
void finish(const Attention& a, const RowTile& t, const char* state) {
  (a.is_double() ? finish_<double> : finish_<float>)(a, t, state);
}
void backward_dq(const Attention& a, const RowTile& t, char* scratch) {
  (a.is_double() ? backward_dq_<double> : backward_dq_<float>)(a, t, scratch);
}
void backward_dkdv(const Attention& a, int64_t sequence, int64_t head_k, int64_t block,
                   char* scratch) {
  (a.is_double() ? backward_dkdv_<double> : backward_dkdv_<float>)(a, sequence, head_k, block,
                                                                   scratch);
}

extern const Kernels table;
const Kernels table = {FA3NPU_NAME, forward_chunk, empty_state,  merge_state,
                       finish,      backward_dq,   backward_dkdv};
