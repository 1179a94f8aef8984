// C (+)= A B, the one product: of q and K, of P and V, and of their gradients. An element of C is
// summed in the order of the depth, whatever tile it is computed in.
//
//   A  U[rows][depth], read at two strides, so that it may be a transpose
//   B  U[depth][columns], columns a multiple of the lanes
//   C  Sum<U>[rows][columns]
// Depth counts U. Of Pairs, A and C have room for whole steps of 16 rows, A and B for whole steps
// of 16 U of depth, which are zero past the end.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/attention.h"
#include "cpu/tile/convert.h"
#if defined(FA3NPU_EMULATED_TILES)
#include "cpu/tile/emulated_tiles.h"
#else
#include "cpu/tile/tiles.h"
#endif

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

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

struct Nothing {
  INLINE void operator()() const {}
};

#if FA3NPU_AMX
// f.operator()<0>(), f.operator()<1>(), ...
template <int N, class F>
INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      INLINE_LAMBDA { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>());
}

// Up to 64 rows of A, of which every 16 lie evenly.
struct TilesOfRows {
  const char* at[4];
  int64_t row_bytes;
};

// Sums that are complete but still in their registers, the first four. To store them waits for the
// last product, so that they are stored among the first products of the next ones.
struct LateSums {
  float* at[4] = {};
  int64_t row_bytes = 0;

  template <int T>
  INLINE void store() {
    if (at[T] != nullptr) tile_store<T>(at[T], row_bytes);
    at[T] = nullptr;
  }
  INLINE void store_all() {
    each<4>([&]<int T>() INLINE_LAMBDA { store<T>(); });
  }
};

// R x C tiles of 16 x 16 sums, at most four. Of the shorter side all tiles are held, those of the
// longer one pass through the registers that are left.
template <int R, int C, class F = Nothing>
INLINE void product_tiles(int64_t depth, const TilesOfRows& a, const Pair* b, int64_t ldb, float* c,
                          int64_t ldc, bool accumulate, LateSums& late, F&& between = F()) {
  const int64_t b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  const auto sums = [&](int i) INLINE_LAMBDA { return c + i / C * 16 * ldc + i % C * 16; };
  const auto begin = [&]<int Sum>() INLINE_LAMBDA {
    late.store<Sum>();
    accumulate ? tile_load<Sum>(sums(Sum), c_bytes) : tile_zero<Sum>();
  };
  const auto multiply = [&]<int Sum, int A, int B>(bool first) INLINE_LAMBDA {
    if (first) begin.template operator()<Sum>();
    tile_multiply_add<Sum, A, B>();
  };
  const auto step = [&](int64_t k, bool first) INLINE_LAMBDA {
    const Pair* const row = b + k * ldb;
    const auto load_a = [&]<int To, int I>()
                            INLINE_LAMBDA { tile_load<To>(a.at[I] + 4 * k, a.row_bytes); };
    if constexpr (R == 2 && C == 2) {  // of many rows, which read B again and again: from afar
      load_a.template operator()<4, 0>();
      tile_load_far<6>(row, b_bytes);
      multiply.template operator()<0, 4, 6>(first);
      tile_load_far<7>(row + 16, b_bytes);
      multiply.template operator()<1, 4, 7>(first);
      between();
      load_a.template operator()<5, 1>();
      multiply.template operator()<2, 5, 6>(first);
      multiply.template operator()<3, 5, 7>(first);
      between();
    } else if constexpr (R <= C) {
      each<R>([&]<int I>() INLINE_LAMBDA { load_a.template operator()<4 + I, I>(); });
      each<C>([&]<int J>() INLINE_LAMBDA {
        constexpr int next = 4 + R + J % (4 - R);
        tile_load<next>(row + 16 * J, b_bytes);
        each<R>([&]<int I>()
                    INLINE_LAMBDA { multiply.template operator()<I * C + J, 4 + I, next>(first); });
        between();
      });
    } else {
      each<C>([&]<int J>() INLINE_LAMBDA { tile_load<4 + J>(row + 16 * J, b_bytes); });
      each<R>([&]<int I>() INLINE_LAMBDA {
        constexpr int next = 4 + C + I % (4 - C);
        load_a.template operator()<next, I>();
        each<C>([&]<int J>()
                    INLINE_LAMBDA { multiply.template operator()<I * C + J, next, 4 + J>(first); });
      });
    }
  };
  if (depth > 0)
    step(0, true);
  else  // as of a linear without columns
    each<R * C>(begin);
  for (int64_t k = 16; k < depth; k += 16) step(k, false);
  each<R * C>([&]<int I>() INLINE_LAMBDA { late.at[I] = sums(I); });
  late.row_bytes = c_bytes;
}

// All rows of the last step are computed: those past `rows` of C mean nothing. a.col must be 1.
// Four sums are under way at a time, also where there are few rows or columns.
template <class U, class F = Nothing>
void product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
             int64_t ldb, float* c, int64_t ldc, bool accumulate, F&& between = F()) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 4> four;
  LateSums late;
  int64_t n = 0;
  const auto all_rows = [&](auto c_tiles) {  // of the next c_tiles * 16 columns
    int64_t r = 0;
    const auto take = [&](auto r_tiles) {
      TilesOfRows x{{}, 4 * a.row};
      for (int i = 0; i < r_tiles; ++i)
        x.at[i] = reinterpret_cast<const char*>(a.from_row(r + 16 * i).at);
      product_tiles<r_tiles, c_tiles>(depth, x, b + n, ldb, c + r * ldc + n, ldc, accumulate, late,
                                      between);
      r += 16 * r_tiles;
    };
    if constexpr (c_tiles == 1)
      while (r + 64 <= rows) take(four);
    if constexpr (c_tiles <= 2)
      while (r + 16 < rows) take(two);
    while (r < rows) take(one);
    n += 16 * c_tiles;
  };
  while (rows <= 16 && n + 64 <= columns) all_rows(four);
  while (n + 16 < columns) all_rows(two);
  if (n < columns) all_rows(one);
  late.store_all();
}
#else
struct ProductState {
  explicit ProductState(int64_t = 0) {}
};

// B as From::vector reads it, rows b_bytes apart.
template <class U, class From, int R, int C, class F>
INLINE void product_block(int64_t depth, const Left<U>& a, const char* b, int64_t b_bytes,
                          Sum<U>* c, int64_t ldc, bool accumulate, F& between) {
  typedef Sum<U> T;
  constexpr int64_t kBytes = From::kElements * From::kBytes;  // of a vector
  Vec<T> acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i)
      acc[r][i] = accumulate ? vec(c + r * ldc + i * kLanes<T>) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    between();
    Vec<U> x[C];
    for (int i = 0; i < C; ++i) x[i] = From::vector(b + k * b_bytes + i * kBytes);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i)
        acc[r][i] = multiply_add(splat(a.at[r * a.row + k * a.col]), x[i], acc[r][i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) store(c + r * ldc + i * kLanes<T>, acc[r][i]);
}

template <class U, class From, int R, class F>
INLINE void product_rows(int64_t columns, int64_t depth, const Left<U>& a, const char* b,
                         int64_t b_bytes, Sum<U>* c, int64_t ldc, bool accumulate, F& between) {
  int64_t n = 0;
  const auto take = [&](auto vectors) {  // as many as fit, so that sums of them run side by side
    constexpr int C = decltype(vectors)::value;
    for (; n + C * kLanes<U> <= columns; n += C * kLanes<U>)
      product_block<U, From, R, C>(depth, a, b + n * From::kBytes * kDepth<U>, b_bytes, c + n, ldc,
                                   accumulate, between);
  };
  take(std::integral_constant<int, FA3NPU_VECTORS>());
  if constexpr (FA3NPU_VECTORS > 2) take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

template <class From, class U, class F = Nothing>
void product_from(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const char* b,
                  int64_t b_bytes, Sum<U>* c, int64_t ldc, bool accumulate, F&& between = F()) {
  int64_t r = 0;
  const auto next = [&](auto n) {  // together, so that B is read once
    product_rows<U, From, decltype(n)::value>(columns, depth, a.from_row(r), b, b_bytes,
                                              c + r * ldc, ldc, accumulate, between);
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

template <class U, class F = Nothing>
void product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
             int64_t ldb, Sum<U>* c, int64_t ldc, bool accumulate, F&& = F()) {
  product_from<Raw<U> >(rows, columns, depth, a, reinterpret_cast<const char*>(b), ldb * sizeof(U),
                        c, ldc, accumulate);
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
template <class U, class Sees, class F = Nothing>
void add_product(int64_t rows, int64_t columns, int64_t depth, const Left<U>& a, const U* b,
                 Sum<U>* c, int64_t ldc, bool finite, U* spare, const Sees& sees,
                 F&& between = F()) {
  if (!finite) {
    const int64_t whole = kDepth<U> == 1 ? depth : round_up(depth, 16);
    __builtin_memcpy(spare, b, sizeof(U) * columns * whole);
    take_non_finite(rows, columns, whole, a, spare, c, ldc, sees);
    b = spare;
  }
  product(rows, columns, depth, a, b, columns, c, ldc, true, between);
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
