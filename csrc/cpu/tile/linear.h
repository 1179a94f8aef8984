// out = x weight^T + bias. Rows of the weight are the left side of the products, rows of x,
// arranged once for all of them, the right one.
//
// Bits: an element is the sum of blocks of its depth, in their order; tiles add a block to it,
// vectors sum a block by lanes, each in the order of the depth, and the lanes in a fixed tree. The
// bias comes last, and is rounded with the sum. Which rows and columns are computed together
// changes nothing.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/linear.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/convert.h"
#include "cpu/tile/product.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

constexpr int64_t kDepthBlock = 512;               // U
constexpr int64_t kPanel = FA3NPU_AMX ? 128 : 48;  // most columns whose sums are kept at a time
// Most rows of x that are computed together: a block of their depth stays in a core's cache.
constexpr int64_t kLinearRows = FA3NPU_AMX ? 512 : 128;
constexpr int64_t kFewLinearRows = FA3NPU_AMX ? 16 : 4;  // computed at the pace of memory

// A block of the depth: it begins at a number and has a number of U, whole vectors of them.
template <class U>
struct DepthBlock {
  int64_t begin, numbers, size;

  DepthBlock(const Linear& l, int64_t k)
      : begin(k * kDepthBlock * kDepth<U>),
        numbers(least(kDepthBlock * kDepth<U>, l.depth - begin)),
        size(round_up(units<U>(numbers), kLanes<U>)) {}
  bool whole() const { return numbers == size * kDepth<U>; }
  static int64_t count(const Linear& l) {  // one at least, be it empty
    return std::max<int64_t>(1, (units<U>(l.depth) + kDepthBlock - 1) / kDepthBlock);
  }
};

// ---- rows one after another, whatever the strides of a matrix ----

template <class U>
INLINE void put(const char* from, ScalarType dtype, U* row, int64_t i) {  // number i of a row
  if constexpr (kDepth<U> == 2)
    __builtin_memcpy(reinterpret_cast<char*>(row) + 2 * i, from, 2);
  else
    load_row<U>(from, dtype, 1, row + i);
}

// n numbers that lie together.
template <class U>
void load_numbers(const char* from, const Matrix& m, int64_t n, U* to) {
  int64_t i = 0;
  with_wide_reader<U>(m.dtype, [&](auto reader) {
    for (; i + reader.kElements <= n; i += reader.kElements)
      store(to + i / kDepth<U>, reader.vector(from + i * reader.kBytes));
  });
  if (i < n) load_row<U>(from + i * m.element, m.dtype, n - i, to + i / kDepth<U>);
}

// A vector of U of as many rows, which lie together.
template <class U, class From>
INLINE Vec<U> across(const char* from, int64_t col) {
#if FA3NPU_BFLOAT16
  if constexpr (kDepth<U> == 2)
    return (Vec<Pair>)FromBFloat16::vector(from + col) |
           (Vec<Pair>)_mm512_srli_epi32((__m512i)FromBFloat16::vector(from), 16);
  else
#endif
    return From::vector(from);
}

// Rows of a matrix whose columns lie together; a multiple of the lanes.
template <class U>
void load_across(const Matrix& m, int64_t first, int64_t rows, const DepthBlock<U>& block, U* to) {
  constexpr int64_t L = kLanes<U>;
  with_wide_reader<U>(m.dtype, [&](auto reader) {
    for (int64_t i = 0; i < block.size; i += L)
      for (int64_t r = 0; r < rows; r += L)
        transpose<U>(
            [&](int64_t j) INLINE_LAMBDA {
              return across<U, decltype(reader)>(m.at(first + r, block.begin + (i + j) * kDepth<U>),
                                                 m.col);
            },
            to + r * kDepthBlock + i, kDepthBlock);
  });
}

// to[row][kDepthBlock]: a block of the depth of rows, zero past the depth.
template <class U>
void load_rows(const Matrix& m, int64_t first, int64_t rows, const DepthBlock<U>& block, U* to) {
  int64_t r = 0;
  if (m.row == m.element && m.col != m.element && block.whole()) {
    r = rows / kLanes<U> * kLanes<U>;
    load_across<U>(m, first, r, block, to);
  }
  for (; r < rows; ++r) {
    U* row = to + r * kDepthBlock;
    const int64_t filled = block.numbers / kDepth<U>;
    fill<U>(row + filled, block.size - filled, U{});
    const char* from = m.at(first + r, block.begin);
    if (m.col == m.element)
      load_numbers<U>(from, m, block.numbers, row);
    else
      for (int64_t i = 0; i < block.numbers; ++i) put(from + i * m.col, m.dtype, row, i);
  }
}

// Rows of the weight as products read them, in bytes.
struct WeightRows {
  const char* at;
  int64_t row;
  WeightRows from_row(int64_t r) const { return {at + r * row, row}; }
};

// f(reader, rows of the weight): where they lie if products can take them so, or in `copy`.
template <class U, class F>
INLINE void with_weight(const Linear& l, int64_t first, int64_t rows, const DepthBlock<U>& block,
                        bool in_place, U* copy, const F& f) {
  const Matrix& w = l.weight;
  const bool even = !FA3NPU_AMX || (rows % 16 == 0 && w.row % sizeof(U) == 0);
  if (in_place && even && w.col == w.element && block.whole() &&
      with_wide_reader<U>(
          w.dtype, [&](auto reader) { f(reader, WeightRows{w.at(first, block.begin), w.row}); }))
    return;
  load_rows<U>(w, first, rows, block, copy);
  f(Raw<U>(), WeightRows{reinterpret_cast<const char*>(copy), kDepthBlock * int64_t(sizeof(U))});
}

// ---- x, arranged for all columns ----

// [block of the depth][row][kDepthBlock]; of tiles [block][group of rows][kDepthBlock][row].
template <class U>
struct ArrangedX {
  const Linear& l;
  int64_t group, rows;
  U* at;

  ArrangedX(const Linear& l, Arena& arena)
      : l(l), group(l.rows > 16 ? 32 : 16), rows(round_up(l.rows, group)) {
    at = arena.take<U>(DepthBlock<U>::count(l) * rows * kDepthBlock);
  }

  U* block(int64_t k, int64_t row) const { return at + (k * rows + row) * kDepthBlock; }

  void arrange(int64_t first, U* strip) const {
    const int64_t count = least(group, l.rows - first);
    for (int64_t k = 0; k < DepthBlock<U>::count(l); ++k) {
      const DepthBlock<U> depth(l, k);
      U* to = block(k, first);
#if FA3NPU_AMX
      for (int64_t r = count; r < group; ++r) fill<U>(strip + r * kDepthBlock, depth.size, U{});
      load_rows<U>(l.x, first, count, depth, strip);
      for (int64_t i = 0; i < depth.size; i += 16)
        for (int64_t r = 0; r < group; r += 16)
          transpose<U>([&](int64_t j) { return vec(strip + (r + j) * kDepthBlock + i); },
                       to + i * group + r, group);
#else
      load_rows<U>(l.x, first, count, depth, to);
#endif
    }
  }
};

// ---- products ----

#if FA3NPU_AMX
// sums[weight's row][ld] (+)= products of a block of the depth.
template <class From, class U>
void add_block(const WeightRows& weight, int64_t columns, int64_t depth, const ArrangedX<U>& x,
               int64_t k, float* sums, int64_t ld, bool adds) {
  const Left<U> rows{reinterpret_cast<const U*>(weight.at), weight.row / int64_t(sizeof(U)), 1};
  for (int64_t m = 0; m < x.rows; m += x.group)
    product<U>(columns, x.group, depth, rows, x.block(k, m), x.group, sums + m, ld, adds);
}
#else
// c[i / C][i % C] (+)= the sum of x[i]'s lanes, from i = Done on.
template <class T, int Done, int All, int C>
INLINE void add_lanes(const Vec<T>* x, T* c, int64_t ldc, bool adds) {
  constexpr int L = kLanes<T>, rest = All - Done;
  constexpr int N = rest < L ? int(std::bit_floor(unsigned(rest))) : L;
  const Vec<T> sum = sums<T, N>(x + Done);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    T& to = c[(Done + i) / C * ldc + (Done + i) % C];
    to = adds ? to + sum[i * (L / N)] : sum[i * (L / N)];
  }
  if constexpr (N < rest) add_lanes<T, Done + N, All, C>(x, c, ldc, adds);
}

// R rows of the weight by C of x.
template <class U, class From, int R, int C>
INLINE void add_dots(const WeightRows& weight, int64_t depth, const U* x, Sum<U>* c, int64_t ldc,
                     bool adds) {
  constexpr int64_t bytes = From::kBytes * kDepth<U>;  // of the weight for a U
  // Rows that are converted as they lie are short; the next ones are asked for.
  constexpr bool ahead = !std::is_same_v<From, Raw<U>> && R > 1;
  Vec<Sum<U>> acc[R * C]{};
  for (int64_t k = 0; k < depth; k += kLanes<U>) {
    Vec<U> b[C];
    for (int j = 0; j < C; ++j) b[j] = vec(x + j * kDepthBlock + k);
    for (int i = 0; i < R; ++i) {
      const char* from = weight.at + i * weight.row + k * bytes;
      if (ahead && k * bytes % 64 == 0) __builtin_prefetch(from + R * weight.row, 0, 2);
      Vec<U> a = From::vector(from);
      stay(a);
      for (int j = 0; j < C; ++j) acc[i * C + j] = multiply_add(a, b[j], acc[i * C + j]);
    }
  }
  add_lanes<Sum<U>, 0, R * C, C>(acc, c, ldc, adds);
}

// Rows of the weight that stay in the nearest cache while x passes.
constexpr int64_t kResident = 2 * FA3NPU_ROWS;

// sums[weight's row][ld] (+)= products of a block of the depth.
template <class From, class U>
void add_block(const WeightRows& weight, int64_t columns, int64_t depth, const ArrangedX<U>& x,
               int64_t k, Sum<U>* sums, int64_t ld, bool adds) {
  for (int64_t first = 0; first < columns; first += kResident) {
    const int64_t end = least(first + kResident, columns);
    int64_t m = 0;
    const auto all_columns = [&](auto rows) {
      constexpr int C = decltype(rows)::value;
      for (; m + C <= x.l.rows; m += C) {
        const U* at = x.block(k, m);
        int64_t n = first;
        for (; n + FA3NPU_ROWS <= end; n += FA3NPU_ROWS)
          add_dots<U, From, FA3NPU_ROWS, C>(weight.from_row(n), depth, at, sums + n * ld + m, ld,
                                            adds);
        for (; n < end; ++n)
          add_dots<U, From, 1, C>(weight.from_row(n), depth, at, sums + n * ld + m, ld, adds);
      }
    };
    all_columns(std::integral_constant<int, FA3NPU_VECTORS>());
    if constexpr (FA3NPU_VECTORS > 2) all_columns(std::integral_constant<int, 2>());
    all_columns(std::integral_constant<int, 1>());
  }
}
#endif

// ---- what the schedule calls ----

template <class U>
struct LinearScratch {
  typedef Sum<U> T;
  U* weight;  // [kPanel][kDepthBlock]
  T* sums;    // [kPanel][ld]
  int64_t ld;
  T* out;  // [lanes][kPanel]
  T* bias;

  LinearScratch(const Linear& l, Arena& arena) : ld(round_up(l.rows, 32)) {
    weight = arena.take<U>(kPanel * kDepthBlock);
    sums = arena.take<T>(kPanel * ld);
    out = arena.take<T>(kLanes<T> * kPanel);
    bias = arena.take<T>(kPanel);
  }
};

template <class U>
int64_t arranged_bytes(const Linear& l) {
  return bytes_of<ArrangedX<U>>(l);
}

template <class U>
int64_t linear_bytes(const Linear& l) {
  return bytes_of<LinearScratch<U>>(l);
}

template <class U>
void arrange_x(const Linear& l, int64_t first, Memory x, Memory scratch) {
  Arena arena(x), own(scratch);
  ArrangedX<U>(l, arena).arrange(first, own.take<U>(32 * kDepthBlock));
}

// Columns [first, first + count) of out from their sums.
template <class U>
void finish_columns(const Linear& l, int64_t first, int64_t count, const LinearScratch<U>& own) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  fill<T>(own.bias, kPanel, T(0));
  for (int64_t n = 0; l.bias.data && n < count; ++n)
    load_row<T>(l.bias.at(0, first + n), l.bias.dtype, 1, own.bias + n);
  for (int64_t m = 0; m < l.rows; m += L) {
    for (int64_t n = 0; n < count; n += L)
      transpose<T>([&](int64_t i) INLINE_LAMBDA { return vec(own.sums + (n + i) * own.ld + m); },
                   own.out + n, kPanel);
    for (int64_t r = 0; r < least(L, l.rows - m); ++r) {
      T* row = own.out + r * kPanel;
      for (int64_t n = 0; l.bias.data && n < count; n += L)
        store(row + n, vec(row + n) + vec(own.bias + n));
      store_row<T>(row, T(1), l.out.dtype, count, l.out.at(m + r, first));
    }
  }
}

// Columns [begin, end) of out.
template <class U>
void linear_columns(const Linear& l, Memory arranged, int64_t begin, int64_t end, Memory scratch) {
  const ProductState product_state;
  Arena arena(scratch), x_arena(arranged);
  const LinearScratch<U> own(l, arena);
  const ArrangedX<U> x(l, x_arena);
  // Of few rows memory is read as it lies, of many a panel is read once.
  const bool few = l.rows <= kFewLinearRows;
  const int64_t together = few ? (FA3NPU_AMX ? 64 : FA3NPU_ROWS) : kPanel;
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t count = least(kPanel, end - panel);
    for (int64_t n = 0; n < count; n += together) {
      const int64_t columns = least(together, count - n);
      for (int64_t k = 0; k < DepthBlock<U>::count(l); ++k) {
        const DepthBlock<U> depth(l, k);
        with_weight<U>(l, panel + n, columns, depth, few, own.weight,
                       [&](auto reader, const WeightRows& weight) {
                         add_block<decltype(reader)>(weight, columns, depth.size, x, k,
                                                     own.sums + n * own.ld, own.ld, k > 0);
                       });
      }
    }
    finish_columns<U>(l, panel, count, own);
  }
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
