// C (+)= A B, the one product: of q and K, of P and V, and of their gradients. An element of C is
// summed in the order of the depth, whatever tile it is computed in.
//
//   A  U[rows][depth], read at two strides, so that it may be a transpose
//   B  U[depth][columns], columns a multiple of the lanes
//   C  Sum<U>[rows][columns]
// Depth counts U. Of Pairs, A and C have room for whole steps of 16 rows, A and B for whole steps
// of 16 U of depth, which are zero past the end.

template <class U>
struct Left {
  const U* at;
  int64_t row, col;
  Left from_row(int64_t r) const { return {at + r * row, row, col}; }
};

template <class U>
constexpr int64_t units(int64_t numbers) {  // how many U hold them
  return (numbers + kDepth<U> - 1) / kDepth<U>;
}

#if FA3NPU_AMX
// Eight tiles of 16 rows of 64 bytes. Released in the end: they make thread switches dear.
struct ProductState {
  ProductState() {
    // Constant, and so complete: gcc 12's intrinsic says that it reads the first 8 bytes only.
    static constexpr struct alignas(64) Tiles {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } tiles;
    _tile_loadconfig(&tiles);
  }
  ~ProductState() { _tile_release(); }
};

// gcc 12's tile loads do not say that they read memory: what was stored must be there by now.
INLINE void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

// Up to 2 x 2 tiles of 16 x 16 sums.
template <bool TwoRows, bool TwoColumns>
INLINE void product_tiles(int64_t depth, const Left<Pair>& a, const Pair* b, int64_t ldb, float* c,
                          int64_t ldc, bool accumulate) {
  const int64_t a_bytes = 4 * a.row, b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (TwoColumns) _tile_loadd(1, c + 16, c_bytes);
    if (TwoRows) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if (TwoRows && TwoColumns) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (TwoColumns) _tile_zero(1);
    if (TwoRows) _tile_zero(2);
    if (TwoRows && TwoColumns) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a.at + k, a_bytes);
    _tile_loadd(6, b + k * ldb, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (TwoColumns) {
      _tile_loadd(7, b + k * ldb + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (TwoRows) {
      _tile_loadd(5, a.at + 16 * a.row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (TwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (TwoColumns) _tile_stored(1, c + 16, c_bytes);
  if (TwoRows) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (TwoRows && TwoColumns) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// One row of tiles by four columns, and four rows by one column: four sums under way at a time
// where there are few rows or columns.
INLINE void product_1x4(int64_t depth, const Left<Pair>& a, const Pair* b, int64_t ldb, float* c,
                        int64_t ldc, bool accumulate) {
  const int64_t b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 32, c_bytes);
    _tile_loadd(3, c + 48, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16, b += 16 * ldb) {
    _tile_loadd(4, a.at + k, 4 * a.row);
    _tile_loadd(5, b, b_bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 16, b_bytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 32, b_bytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 48, b_bytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 32, c_bytes);
  _tile_stored(3, c + 48, c_bytes);
}

INLINE void product_4x1(int64_t depth, const Left<Pair>& a, const Pair* b, int64_t ldb, float* c,
                        int64_t ldc) {
  before_tile_loads();
  const int64_t a_bytes = 4 * a.row, c_bytes = 4 * ldc;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 16) {
    const Pair* at = a.at + k;
    _tile_loadd(4, b + k * ldb, 4 * ldb);
    _tile_loadd(5, at, a_bytes);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, at + 16 * a.row, a_bytes);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, at + 32 * a.row, a_bytes);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, at + 48 * a.row, a_bytes);
    _tile_dpbf16ps(3, 5, 4);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16 * ldc, c_bytes);
  _tile_stored(2, c + 32 * ldc, c_bytes);
  _tile_stored(3, c + 48 * ldc, c_bytes);
}

// All rows of the last step are computed: those past `rows` of C mean nothing. a.col must be 1.
template <class U>
void product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
             int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  before_tile_loads();
  const auto tiles = [&](auto two_rows, auto two_columns, int64_t r, int64_t n) {
    product_tiles<decltype(two_rows)::value, decltype(two_columns)::value>(
        depth, a.from_row(r), b + n, ldb, c + r * ldc + n, ldc, accumulate);
  };
  constexpr std::true_type two;
  constexpr std::false_type one;
  int64_t n = 0;
  for (; rows <= 16 && n + 64 <= columns; n += 64)
    product_1x4(depth, a, b + n, ldb, c + n, ldc, accumulate);
  for (; n < columns; n += 32) {
    const bool two_columns = n + 16 < columns;
    int64_t r = 0;
    for (; r + 16 < rows; r += 32) two_columns ? tiles(two, two, r, n) : tiles(two, one, r, n);
    if (r < rows) two_columns ? tiles(one, two, r, n) : tiles(one, one, r, n);
  }
}
#else
struct ProductState {
  ProductState() {}
};

template <class U, int R, int C>
INLINE void product_block(int64_t depth, const Left<U>& a, const U* b, int64_t ldb, Sum<U>* c,
                          int64_t ldc, bool accumulate) {
  typedef Sum<U> T;
  Vec<T> acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i)
      acc[r][i] = accumulate ? vec(c + r * ldc + i * kLanes<T>) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<U> x[C];
    for (int i = 0; i < C; ++i) x[i] = vec(b + k * ldb + i * kLanes<U>);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i) multiply_add(acc[r][i], a.at[r * a.row + k * a.col], x[i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) vec(c + r * ldc + i * kLanes<T>) = acc[r][i];
}

template <class U, int R>
INLINE void product_rows(int64_t columns, int64_t depth, const Left<U>& a, const U* b, int64_t ldb,
                         Sum<U>* c, int64_t ldc, bool accumulate) {
  constexpr int C = FA3NPU_VECTORS;
  int64_t n = 0;
  for (; n + C * kLanes<U> <= columns; n += C * kLanes<U>)
    product_block<U, R, C>(depth, a, b + n, ldb, c + n, ldc, accumulate);
  for (; n < columns; n += kLanes<U>)
    product_block<U, R, 1>(depth, a, b + n, ldb, c + n, ldc, accumulate);
}

template <class U>
void product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
             int64_t ldb, Sum<U>* c, int64_t ldc, bool accumulate) {
  int64_t r = 0;
  const auto next = [&](auto n) {  // together, so that B is read once
    product_rows<U, decltype(n)::value>(columns, depth, a.from_row(r), b, ldb, c + r * ldc, ldc,
                                        accumulate);
  };
  for (; r + FA3NPU_ROWS <= rows; r += FA3NPU_ROWS)
    next(std::integral_constant<int, FA3NPU_ROWS>());
  switch (rows - r) {
    case 1:
      return next(std::integral_constant<int, 1>());
    case 2:
      return next(std::integral_constant<int, 2>());
    case 3:
      return next(std::integral_constant<int, 3>());
    case 4:
      return next(std::integral_constant<int, 4>());
    case 5:
      return next(std::integral_constant<int, 5>());
  }
}
#endif

// What the non-finite elements of B add to C; they become zero in B. A row of C takes what it sees.
template <class U, class Sees>
__attribute__((noinline)) void take_non_finite(int64_t rows, int64_t columns, int64_t depth,
                                               const Left<U>& a, U* b, Sum<U>* c, int64_t ldc,
                                               const Sees& sees) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t half = 0; half < kDepth<U>; ++half) {
        const Sum<U> x = number(b[k * columns + n], half);
        if (std::isfinite(x)) continue;
        for (int64_t r = 0; r < rows; ++r)
          if (sees(r, k * kDepth<U> + half))
            c[r * ldc + n] += number(a.at[r * a.row + k * a.col], half) * x;
        clear(b[k * columns + n], half);
      }
}

// C += A B, where B has no gaps between its rows and a row of A is zero at what it does not
// see(row, depth): not even a NaN comes from there. `spare` is for a copy of a B that is not
// finite.
template <class U, class Sees>
void add_product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
                 Sum<U>* c, int64_t ldc, bool finite, U* spare, const Sees& sees) {
  if (!finite) {
    const int64_t whole = kDepth<U> == 1 ? depth : round_up(depth, 16);
    __builtin_memcpy(spare, b, sizeof(U) * columns * whole);
    take_non_finite(rows, columns, depth, a, spare, c, ldc, sees);
    b = spare;
  }
  product(rows, columns, depth, a, b, columns, c, ldc, true);
}
