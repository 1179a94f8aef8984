// The forward pass of few query rows, as of a decode, at the pace of memory: a step of keys is read
// for all KV heads, which lie together, before the next one.

#pragma once

#include <cstdint>
#include <utility>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/operands.h"
#include "cpu/tile/softmax.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

constexpr int64_t kStep = 32;

// Asks for rows of keys ahead of their use: some lines at each of the calls over which they are
// spread, as a processor drops what is asked for in one go, or waits for it.
struct Ahead {
  const char* const* row;
  const char* const* end;
  int64_t offset, bytes;  // of each row
  int64_t at = 0, lines = 0;

  INLINE Ahead over(int64_t calls) const {
    Ahead spread = *this;
    spread.lines = ((end - row) * ((bytes + 63) / 64) + calls - 1) / calls;
    return spread;
  }
  INLINE void operator()() {
    for (int64_t n = 0; n < lines && row < end; ++n) {
      __builtin_prefetch(*row + offset + at, 0, 2);
      at += 64;
      if (at >= bytes) at = 0, ++row;
    }
  }
};

#if FA3NPU_AMX
// A step of keys or values as they lie, [key][ld]: no transpose and no pairs for so little use.
template <class U>
struct StepOfKeys {
  U* copy;
  Sum<U>* sums;  // of each row with the first and the second columns of pairs

  StepOfKeys(const Attention& a, Arena& arena)
      : copy(arena.take<U>(kStep * units<U>(padded<U>(greater(a.headdim, a.headdim_v))))),
        sums(arena.take<Sum<U>>(kFewRows * padded<U>(a.headdim_v))) {}

  // Where they lie, if evenly, every 16 or all; or in a copy that is zero past the last.
  TilesOfRows load(const KeyRows& keys, const Rows& cache, int64_t head, int64_t width,
                   bool all) const {
    const int64_t ld = units<U>(padded<U>(width));
    const bool whole = width == ld * kDepth<U> && keys.count == kStep;
    const bool in_place = whole && keys.even && cache.dtype == ScalarType::BFloat16 &&
                          !(all && keys.at[16] - keys.at[0] != 16 * cache.row);
    if (!in_place) {
      if (!whole) fill<U>(copy, kStep * ld, U{});
      for (int64_t j = 0; j < keys.count; ++j)
        load_row(keys.at[j] + head * cache.head, cache.dtype, width, copy + j * ld);
    }
    TilesOfRows rows{{}, in_place ? cache.row : ld * int64_t(sizeof(U))};
    for (int64_t i = 0; i < kStep / 16; ++i)
      rows.at[i] = in_place ? keys.at[16 * i] + head * cache.head
                            : reinterpret_cast<const char*>(copy + 16 * i * ld);
    return rows;
  }
};
#else
template <class U>
struct StepOfKeys : KeyTile<U> {
  StepOfKeys(const Attention& a, Arena& arena) : KeyTile<U>(a.headdim, false, true, arena) {}
};
#endif

// f(std::integral_constant<int, n>()) if n is in [1, N]; returns whether it is.
template <int N, class F>
INLINE bool with_constant(int64_t n, const F& f) {
  return [&]<int... I>(std::integer_sequence<int, I...>) INLINE_LAMBDA {
    return ((n == I + 1 && (f(std::integral_constant<int, I + 1>()), true)) || ...);
  }(std::make_integer_sequence<int, N>());
}

// A tile of few rows, and its part of scratch memory.
template <class U>
struct FewRows {
  typedef Sum<U> T;
  static constexpr int64_t p_ld = kKeyBlock / kDepth<U>;
  QueryTile<U> q;
  State<T> state;
  T* scores;   // [kFewRows][kKeyBlock]
  U* p;        // [kFewRows][p_ld]
  U* columns;  // of AMX: q as [ld][kFewRows], the right side of the scores

  FewRows(const Attention& a, Arena& arena) : q(a, arena) {
    scores = arena.take<T>(kFewRows * kKeyBlock);
    p = kDepth<U> == 1 ? reinterpret_cast<U*>(scores) : arena.take<U>(kFewRows * p_ld);
    columns = FA3NPU_AMX ? arena.take<U>(q.ld * kFewRows) : nullptr;
  }

  void load(const RowTile& tile, Memory state_memory) {
    q.load(tile);
    empty_state<T>(q.a, state_memory);
    state = State<T>(q.a, state_memory);
#if FA3NPU_AMX
    fill<U>(q.q + q.rows * q.ld, (kFewRows - q.rows) * q.ld, U{});
    for (int64_t c = 0; c < q.ld; c += kFewRows)
      transpose<U>([&](int64_t r) { return vec(q.q + r * q.ld + c); }, columns + c * kFewRows,
                   kFewRows);
#endif
  }

  // How many rows AMX's tiles of values have: two for each, of at most 8 rows at a time.
  static int64_t tile_rows(int64_t rows) { return least(2 * rows, 16); }

  // The scores of a step of keys, the block's from column j on.
  void take_scores(const KeyRows& keys, int64_t j, StepOfKeys<U>& k, Ahead ahead) const {
#if FA3NPU_AMX
    alignas(64) T by_key[kStep * kFewRows];
    LateSums late;
    product_tiles<kStep / 16, 1>(q.ld, k.load(keys, q.a.k, q.head_k, q.a.headdim, false), columns,
                                 kFewRows, by_key, kFewRows, false, late);
    late.store_all();
    ahead = ahead.over(kStep / kFewRows);
    for (int64_t i = 0; i < kStep; i += kFewRows) {
      ahead();
      transpose<T>([&](int64_t key) { return vec(by_key + (i + key) * kFewRows); }, scores + j + i,
                   kKeyBlock);
    }
#else
    const auto in_registers = [&](auto reader) INLINE_LAMBDA {
      with_constant<kRowsInRegisters>(q.rows, [&](auto rows) {
        scores_in_registers<decltype(reader), decltype(rows)::value>(keys, scores + j, ahead);
      });
    };
    if (k.width == k.ld && q.rows <= kRowsInRegisters && with_reader<U>(q.a.k.dtype, in_registers))
      return;
    ahead.over(1)();
    k.load(keys, q.a.k, q.head_k);
    q.scores(0, q.rows, kStep, k, k, scores + j);  // there is no qv
#endif
  }

#if !FA3NPU_AMX
  // As many as have their sums in registers, beside a square of keys.
  static constexpr int kRowsInRegisters = FA3NPU_AVX512 ? 8 : 4;

  // The same sums in the same order, without a transposed copy of the keys in memory. Two squares
  // of keys take turns where there is room, so that no sum is waited for.
  template <class From, int R>
  void scores_in_registers(const KeyRows& keys, T* to, Ahead ahead) const {
    constexpr int L = kLanes<U>;
    constexpr int kCalls = L < 4 ? L : 4;  // a square
    ahead =
        ahead.over(kStep / L * (round_up(q.a.headdim, From::kElements) / From::kElements) * kCalls);
    const char* from[kStep];
    const int64_t head = q.head_k * q.a.k.head;
    for (int64_t i = 0; i < keys.count; ++i) from[i] = keys.at[i] + head;
    for (int64_t i = keys.count; i < kStep; ++i) from[i] = kZeros;
    const auto add_square = [&](int64_t j, int64_t c, Vec<T>* sums) INLINE_LAMBDA {
      Vec<U> x[L];
      if constexpr (kOfCodes<From>) {
        From::transposed(from + j, c, x);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) x[i] = From::vector(from[j + i] + c * From::kBytes);
        transpose_square<U>(x);
      }
      const U* const left = q.q + c / kDepth<U>;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (i % (L / kCalls) == 0) ahead();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add_products(left + r * q.ld + i, x[i], sums[r]);
      }
      __asm__ volatile("" ::: "memory");  // the next square is not loaded yet: there is no room
    };
    const auto finish = [&](int64_t j, const Vec<T>* sums) INLINE_LAMBDA {
      for (int r = 0; r < R; ++r) store(to + r * kKeyBlock + j, sums[r]);
    };
    if constexpr (2 * R <= kRowsInRegisters) {
      for (int64_t j = 0; j < kStep; j += 2 * L) {
        Vec<T> sums[R] = {}, others[R] = {};
        for (int64_t c = 0; c < q.a.headdim; c += From::kElements) {
          add_square(j, c, sums);
          add_square(j + L, c, others);
        }
        finish(j, sums);
        finish(j + L, others);
      }
    } else {
      for (int64_t j = 0; j < kStep; j += L) {
        Vec<T> sums[R] = {};
        for (int64_t c = 0; c < q.a.headdim; c += From::kElements) add_square(j, c, sums);
        finish(j, sums);
      }
    }
  }
#endif

#if FA3NPU_BFLOAT16 && !FA3NPU_AMX
  // out += P V of a whole step of keys, without a copy of them as Pairs.
  template <class From, int R>
  void values_in_registers(const KeyRows& keys, const Left<U>& left, Ahead ahead) const {
    const Rows& cache = q.a.v;
    ahead = ahead.over(kStep / 2 * ((q.a.headdim_v + 63) / 64));
    const auto add = [&](int64_t c, auto vectors) INLINE_LAMBDA {
      constexpr int C = decltype(vectors)::value;  // of sums
      const int64_t offset = q.head_k * cache.head + c * From::kBytes;
      T* const out = state.out + c;
      Vec<T> sums[R][C];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < C; ++i) sums[r][i] = vec(out + r * state.ld + i * kLanes<T>);
      for (int64_t j = 0; j < kStep / 2; ++j) {
        ahead();
        const char *const x = keys.at[2 * j] + offset, *const y = keys.at[2 * j + 1] + offset;
        Interleaved<Pair> v[C / 2];
        for (int i = 0; i < C / 2; ++i) {
          const int64_t at = i * From::kElements * From::kBytes;
          if constexpr (kOfCodes<From>)
            v[i] = From::interleaved(x + at, y + at);
          else
            v[i] = interleaved(From::vector(x + at), From::vector(y + at));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<U> weight = splat(left.at[r * left.row + j]);
          for (int i = 0; i < C; i += 2) {
            sums[r][i] = multiply_add(weight, v[i / 2].first, sums[r][i]);
            sums[r][i + 1] = multiply_add(weight, v[i / 2].last, sums[r][i + 1]);
          }
        }
      }
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < C; ++i) store(out + r * state.ld + i * kLanes<T>, sums[r][i]);
    };
    int64_t c = 0;
    if constexpr (R <= 4)
      for (; c + 64 <= q.a.headdim_v; c += 64) add(c, std::integral_constant<int, 4>());
    for (; c < q.a.headdim_v; c += 32) add(c, std::integral_constant<int, 2>());
  }
#endif

#if FA3NPU_AMX
  // out += P V of a step of keys without making pairs of keys. As the right side of tiles, a row of
  // V is pairs of columns. So P's rows come twice: beside the first and the second columns, with
  // zeros beside the others. Even keys go before odd ones: these are the sums of pairs of keys, in
  // the same order. Where they are not finite, which a zero may have made of a value that is not,
  // nothing is added: returns whether.
  bool add_values_in_place(const TilesOfRows& v, const Left<U>& left, T* sums, Ahead ahead) const {
    constexpr int64_t L = kLanes<U>, kRows = 8;
    const int64_t per_tile = tile_rows(q.rows) * L;
    ahead = ahead.over((q.rows + kRows - 1) / kRows * (state.ld / L));
    T* to = sums;
    for (int64_t begin = 0; begin < q.rows; begin += kRows) {
      alignas(64) U weights[2][2 * kRows][L] = {};
      for (int64_t r = 0; r < least(kRows, q.rows - begin); ++r) {
        const Vec<U> x = vec(left.at + (begin + r) * left.row);
        store(weights[0][2 * r], x & 0xffff);
        store(weights[0][2 * r + 1], x << 16);
        store(weights[1][2 * r], (x >> 16) & 0xffff);
        store(weights[1][2 * r + 1], x & ~0xffff);
      }
      tile_load<2>(weights[0], sizeof weights[0][0]);
      tile_load<3>(weights[1], sizeof weights[1][0]);
      for (int64_t c = 0; c < state.ld; c += 2 * L, to += per_tile) {
        const char* const even = v.at[0] + 2 * c;
        tile_zero<0>();
        tile_load<5>(even, 2 * v.row_bytes);
        tile_multiply_add<0, 2, 5>();
        ahead();
        tile_load<6>(even + v.row_bytes, 2 * v.row_bytes);
        tile_multiply_add<0, 3, 6>();
        ahead();
        tile_store<0>(to, L * sizeof(T));
      }
    }
    if (!all_finite(sums, to - sums)) return false;
    to = sums;
    for (int64_t begin = 0; begin < q.rows; begin += kRows)
      for (int64_t c = 0; c < state.ld; c += 2 * L, to += per_tile)
        for (int64_t r = 0; r < least(kRows, q.rows - begin); ++r) {
          T* const out = state.out + (begin + r) * state.ld + c;
          const auto x = interleaved(vec(to + 2 * r * L), vec(to + (2 * r + 1) * L));
          store(out, flushed(flushed(vec(out)) + x.first));  // as tiles add
          store(out + L, flushed(flushed(vec(out + L)) + x.last));
        }
    return true;
  }
#endif

  void take_softmax(int64_t block, int64_t columns) const {
    for (int64_t r = 0; r < q.rows; r += kLanes<T>) {
      const int64_t count = least(kLanes<T>, q.rows - r);
      T alpha[kLanes<T>];
      SoftmaxStep<U>(q, state, r, count, block, columns, scores + r * kKeyBlock, alpha,
                     p + r * p_ld)
          .take_all();
      rescale(state, r, count, alpha);
    }
  }

  // out += P V of a step of keys, the block's from column j on.
  void add_values(const KeyRows& keys, int64_t block, int64_t j, KeyTile<U>& v,
                  [[maybe_unused]] const StepOfKeys<U>& step, Ahead ahead) const {
    const Rows& cache = q.a.v;
    const bool all_see = q.all_see(block, 0, q.rows);
    const Left<U> left{p + j / kDepth<U>, p_ld, 1};
#if FA3NPU_AMX
    const TilesOfRows rows = step.load(keys, cache, q.head_k, q.a.headdim_v, true);
    if (add_values_in_place(rows, left, step.sums, ahead)) return;
#else
    const bool whole = all_see && keys.count == kStep && v.width == v.ld;
    if constexpr (kDepth<U> == 1) {
      const bool in_place = whole && keys.even;
      const auto multiply = [&](auto reader) {
        Ahead spread = ahead.over(kStep * ((v.width + 63) / 64));
        for (int64_t i = 0; i < kStep; i += 16) {
          product_from<decltype(reader), U>(q.rows, v.width, 16, {left.at + i, p_ld, 1},
                                            keys.at[i] + q.head_k * cache.head, cache.row,
                                            state.out, state.ld, true, spread);
        }
      };
      if (in_place && with_reader<U>(cache.dtype, multiply)) return;
    }
#if FA3NPU_BFLOAT16
    const auto in_registers = [&](auto reader) INLINE_LAMBDA {
      with_constant<kRowsInRegisters>(q.rows, [&](auto rows) {
        values_in_registers<decltype(reader), decltype(rows)::value>(keys, left, ahead);
      });
    };
    if (whole && q.rows <= kRowsInRegisters && with_reader<U>(cache.dtype, in_registers)) return;
#endif
#endif
    ahead.over(1)();
    v.load(keys, cache, q.head_k);
    add_product<U>(q.rows, v.ld, kStep / kDepth<U>, left, v.rows, state.out, state.ld,
                   all_see || v.finite(keys.count), v.spare,
                   [&](int64_t r, int64_t key) { return q.sees(r, block + j + key); });
  }
};

template <class U>
struct FewScratch {
  FewRows<U>* heads;
  StepOfKeys<U> k;
  KeyTile<U> v;

  FewScratch(const Attention& a, int64_t count, Arena& arena)
      : heads(arena.make<FewRows<U>>(count, a)), k(a, arena), v(a.headdim_v, true, false, arena) {}
};

// `count` tiles of one sequence and the same few rows, of neighbouring KV heads.
template <class U>
void forward_few(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                 Memory states, Memory scratch) {
  Arena arena(scratch);
  FewScratch<U> own(a, count, arena);
  const FewRows<U>* const heads = own.heads;
  for (int64_t i = 0; i < count; ++i)
    own.heads[i].load(tiles[i], states.part(i, state_bytes<Sum<U>>(a)));

  const QueryTile<U>& q = heads->q;  // who sees what is the same for all
  const int64_t last = least(q.s->k_len, visible(a, tiles[0]).end);
  const int64_t end = least((chunk + 1) * kChunk, last);
  const auto seen_from = [&](int64_t block) {
    while (block < end && !q.any_sees(block, 0, q.rows)) block += kKeyBlock;
    return block;
  };
  struct Part {
    const Rows& cache;
    int64_t width;
  };
  const Part k{a.k, a.headdim}, v{a.v, a.headdim_v};
  const auto rows_of = [&](const Part& part, int64_t key) {
    return KeyRows(a, part.cache, *q.s, key, clamp(last - key, 0, kStep));
  };
  // How many heads ahead memory is asked for: a step, if it is not large, as near caches have other
  // uses; or one, where steps are quick as they are.
  constexpr int64_t kMostAhead = 128 << 10;  // bytes
  const int64_t a_head = kStep * greater(k.width * a.k.element, v.width * a.v.element);
  const int64_t heads_ahead = FA3NPU_AMX ? 1 : clamp(kMostAhead / a_head, 1, count);
  KeyRows keys, next = rows_of(k, seen_from(chunk * kChunk));
  // work(head, j, what to ask for) for the steps of a block; `then` those of another
  const auto steps = [&](const Part& part, int64_t block, int64_t columns, const Part& then_part,
                         int64_t then, const auto& work) INLINE_LAMBDA {
    for (int64_t j = 0; j < columns; j += kStep) {
      const bool ends = j + kStep >= columns;
      const Part& next_part = ends ? then_part : part;
      keys = next;
      next = rows_of(next_part, ends ? then : block + j + kStep);
      for (int64_t i = 0; i < count; ++i) {
        const bool wraps = i + heads_ahead >= count;
        const KeyRows& rows = wraps ? next : keys;
        const Part& of = wraps ? next_part : part;
        const int64_t head_k = tiles[(i + heads_ahead) % count].head_k;
        work(heads[i], j,
             Ahead{rows.at, rows.at + rows.count, head_k * of.cache.head,
                   of.width * of.cache.element});
      }
    }
  };
  for (int64_t block = seen_from(chunk * kChunk), then; block < end; block = then) {
    then = seen_from(block + kKeyBlock);
    const int64_t columns = q.columns_of(block, 0, q.rows);
    {
      const ProductState product_state;
      steps(k, block, columns, v, block,
            [&](const FewRows<U>& head, int64_t j, Ahead ahead)
                INLINE_LAMBDA { head.take_scores(keys, j, own.k, ahead); });
    }
    for (int64_t i = 0; i < count; ++i) heads[i].take_softmax(block, columns);
    const ProductState product_state(FewRows<U>::tile_rows(q.rows));
    steps(v, block, columns, k, then,
          [&](const FewRows<U>& head, int64_t j, Ahead ahead)
              INLINE_LAMBDA { head.add_values(keys, block, j, own.v, own.k, ahead); });
  }
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
