// The gradient: P = exp(S - LSE), dS = P (dP - delta) and delta = rowsum(dout out) - dLSE. dk and
// dv of a tile of keys are one thread's; to dq the tiles of keys add in turn. So no sum depends on
// a schedule.

#pragma once

#include <cstdint>
#include <new>

#include "cpu/attention.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/operands.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

// delta of some positions as the product that dP is: where a row sees one key, dP - delta is then
// exactly 0. A row that sees nothing has its dq here.
template <class U>
void backward_delta(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                    char* scratch) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  const ProductState product_state;
  const Sequence& s = a.sequences[sequence];
  const int64_t ld = padded<U>(a.headdim_v) / kDepth<U>;
  Arena arena{scratch};
  U *dout = arena.take<U>(16 * ld), *out = arena.take<U>(L * ld), *columns = arena.take<U>(ld * L);
  T* products = arena.take<T>(16 * L);  // of every row with every row: the diagonal counts
  fill<U>(dout, 16 * ld, U{});
  fill<U>(out, L * ld, U{});
  for (int64_t position = begin; position < end; ++position) {
    const int64_t i = s.q_begin + position;
    const KeyRange keys = a.visible(s, position);
    for (int64_t first = 0; first < a.nheads; first += L) {
      const int64_t heads = least(L, a.nheads - first);
      for (int64_t h = 0; h < heads; ++h) {
        load_row(a.dout.at(s.q_batch, i, first + h), a.dout.dtype, a.headdim_v, dout + h * ld);
        load_row(a.out.at(s.q_batch, i, first + h), a.out.dtype, a.headdim_v, out + h * ld);
      }
      for (int64_t c = 0; c < ld; c += L)
        transpose<U>([&](int64_t h) { return vec(out + h * ld + c); }, columns + c * L, L);
      product<U>(heads, L, units<U>(a.headdim_v), {dout, ld, 1}, columns, L, products, L, false);
      for (int64_t h = 0; h < heads; ++h) {
        T delta = products[h * L + h];
        if (a.dsoftmax_lse.data) delta -= a.dsoftmax_lse.at(s.q_batch, i, first + h);
        *reinterpret_cast<T*>(a.delta.at(s.q_batch, i, first + h)) = delta;
        if (keys.begin == keys.end)
          __builtin_memset(a.dq.at(s.q_batch, i, first + h), 0, a.headdim * a.dq.element);
      }
    }
  }
}

template <class U>
struct GradientTile {
  typedef Sum<U> T;
  QueryTile<U> q;
  U* dout;  // [row][q.ld_v]
  T *lse, *delta;

  GradientTile(const Attention& a, const RowTile& t, Arena& arena) : q(a, t, arena) {
    dout = arena.take<U>(a.row_capacity() * q.ld_v);
    lse = arena.take<T>(a.row_tile);
    delta = arena.take<T>(a.row_tile);
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t i = q.s.q_begin + q.position[r], head = q.head(r);
      q.load_q(a.dout, q.position[r], head, a.headdim_v, q.ld_v, 1, dout + r * q.ld_v);
      lse[r] = quiet(a.softmax_lse.at(q.s.q_batch, i, head));
      delta[r] = quiet(*reinterpret_cast<const T*>(a.delta.at(q.s.q_batch, i, head)));
    }
  }

  // p[row - begin][kKeyBlock] and ds of `count` rows against the first `columns` keys of a block
  void differentiate(int64_t begin, int64_t count, int64_t block, int64_t columns,
                     const KeyTile<U>& k, const KeyTile<U>& v, T* p, T* ds) const {
    q.scores(begin, count, columns, k, v, p);
    product<U>(count, columns, units<U>(q.a.headdim_v), {dout + begin * q.ld_v, q.ld_v, 1},
               v.transposed, kKeyBlock, ds, kKeyBlock, false);
    for (int64_t i = 0; i < count; ++i, p += kKeyBlock, ds += kKeyBlock) {
      const int64_t r = begin + i;
      if (lse[r] == -T(kInf)) {  // the row sees nothing
        fill<T>(p, columns, T(0));
        fill<T>(ds, columns, T(0));
      } else if (q.plain(r, block)) {
        const T scale = T(q.a.softmax_scale), row_lse = lse[r], row_delta = delta[r];
        for (int64_t lane = 0; lane < columns; lane += kLanes<T>) {
          const Vec<T> y = exp_(vec(p + lane) * scale - row_lse);
          store(p + lane, y);
          store(ds + lane, y * (vec(ds + lane) - row_delta) * scale);
        }
      } else {
        differentiate_masked(r, block, columns, p, ds);
      }
    }
  }

  void differentiate_masked(int64_t r, int64_t block, int64_t columns, T* p, T* ds) const {
    for (int64_t lane = 0; lane < columns; lane += kLanes<T>) {
      Vec<T> capped;
      const Vec<T> x = q.logits(r, block, lane, vec(p + lane), &capped);
      const auto masked = x == -T(kInf);  // not even a NaN of the row reaches a masked key
      const Vec<T> y = masked ? Vec<T>{} : exp_(x - lse[r]);
      Vec<T> gradient = y * (vec(ds + lane) - delta[r]) * T(q.a.softmax_scale);
      if (q.a.softcap > 0) {
        capped /= T(q.a.softcap);
        gradient *= multiply_add(-capped, capped, splat(T(1)));
      }
      store(p + lane, y);
      store(ds + lane, masked ? Vec<T>{} : gradient);
    }
  }
};

// dS of some rows as the left side of a product summed over keys; `narrowed` is for Pairs.
template <class U>
Left<U> over_keys(int64_t rows, const Sum<U>* ds, U* narrowed) {
  if constexpr (kDepth<U> == 1) {
    return {ds, kKeyBlock, 1};
  } else {
    constexpr int64_t L = kLanes<Sum<U>>;
    for (int64_t i = 0; i < rows * kKeyBlock; i += 2 * L)
      narrow(vec(ds + i), vec(ds + i + L), narrowed + i / kDepth<U>);
    return {narrowed, kKeyBlock / kDepth<U>, 1};
  }
}

// P or dS of a tile of rows, group by group, as the left side of a product summed over rows: of
// Pairs, a transpose.
template <class U>
struct OverRows {
  typedef Sum<U> T;
  T* values;      // [row][kKeyBlock]; of Pairs, those of one group
  U* transposed;  // [key][ld], of Pairs
  int64_t ld;

  OverRows(Arena& arena, int64_t rows) : ld(rows / kDepth<U>) {
    values = arena.take<T>((kDepth<U> == 1 ? rows : kRowGroup<U>)*kKeyBlock);
    transposed = kDepth<U> == 1 ? nullptr : arena.take<U>(kKeyBlock * ld);
  }

  T* group(int64_t begin) const { return kDepth<U> == 1 ? values + begin * kKeyBlock : values; }

  void take(int64_t begin, int64_t rows) {
    if constexpr (kDepth<U> == 2) {
      const int64_t whole = round_up(rows, 2 * kLanes<U>);
      fill<T>(values + rows * kKeyBlock, (whole - rows) * kKeyBlock, T(0));
      for (int64_t r = 0; r < whole; r += 2 * kLanes<U>)
        for (int64_t j = 0; j < kKeyBlock; j += kLanes<U>) {
          const auto pairs = [&](int64_t i) {
            const T* row = values + (r + 2 * i) * kKeyBlock + j;
            return pair_up(vec(row), vec(row + kKeyBlock));
          };
          transpose<U>(pairs, transposed + j * ld + (begin + r) / 2, ld);
        }
    }
  }

  Left<U> left(int64_t from) const {
    if constexpr (kDepth<U> == 1)
      return {values + from * kKeyBlock, 1, kKeyBlock};
    else
      return {transposed + from / 2, ld, 1};
  }
};

// Rows of q or dout, [row][ld], as the right side of a product summed over rows.
template <class U>
struct RowPanel {
  const U* at;
  U* spare;
  bool finite;

  RowPanel(Arena& arena, const U* rows, int64_t ld, int64_t count, int64_t capacity) : at(rows) {
    spare = arena.take<U>(capacity * ld);
    if constexpr (kDepth<U> == 2) {
      U* panel = arena.take<U>(capacity * ld);
      const auto row = [&](int64_t r, int64_t c) {
        return r < count ? vec(rows + r * ld + c) : Vec<U>{};
      };
      for (int64_t r = 0; r < capacity; r += 2)
        for (int64_t c = 0; c < ld; c += kLanes<U>)
          interleave(row(r, c), row(r + 1, c), panel + r * ld + 2 * c);
      at = panel;
    }
    finite = all_finite(at, (kDepth<U> == 2 ? capacity : count) * ld);
  }
};

static_assert(kKeyTileUnit % kKeyBlock == 0);

template <class U>
void backward_keys(const Attention& a, const KeyTask& task, char* scratch) {
  typedef Sum<U> T;
  const ProductState product_state;
  const Sequence& s = a.sequences[task.sequence];
  const int64_t first = task.first, end = task.end;
  const int64_t all_rows = a.rows(task.sequence), capacity = a.row_capacity();
  Arena arena{scratch};
  struct Block {
    KeyTile<U> k, v;
    bool finite;
    T *dk, *dv;  // [kKeyBlock][k.ld], [kKeyBlock][v.ld]
    Block(const Attention& a, Arena& arena)
        : k(arena, a.headdim, true, true), v(arena, a.headdim_v, false, true) {
      dk = arena.take<T>(kKeyBlock * k.ld);
      dv = arena.take<T>(kKeyBlock * v.ld);
      fill<T>(dk, kKeyBlock * k.ld, T(0));
      fill<T>(dv, kKeyBlock * v.ld, T(0));
    }
  };
  auto* blocks = reinterpret_cast<Block*>(arena.take<char>(kKeyTile / kKeyBlock * sizeof(Block)));
  const auto block_at = [&](int64_t key) -> Block& { return blocks[(key - first) / kKeyBlock]; };
  for (int64_t key = first; key < end; key += kKeyBlock) {
    const int64_t keys = least(kKeyBlock, s.k_len - key);
    Block& b = *new (&block_at(key)) Block(a, arena);
    b.k.load(KeyRows(a, a.k, s, key, keys), a.k, task.head_k);
    b.v.load(KeyRows(a, a.v, s, key, keys), a.v, task.head_k);
    b.finite = b.k.finite(keys);
  }
  OverRows<U> p(arena, capacity), ds(arena, capacity);

  for (int64_t row = 0; row < all_rows; row += a.row_tile) {
    const RowTile t{task.sequence, task.head_k, row, least(a.row_tile, all_rows - row)};
    const KeyRange seen = visible(a, t);
    if (seen.begin >= least(seen.end, end) || seen.end <= first) continue;
    Arena tile = arena;
    const GradientTile<U> g(a, t, tile);
    const RowPanel<U> q(tile, g.q.q, g.q.ld, t.rows, capacity);
    const RowPanel<U> dout(tile, g.dout, g.q.ld_v, t.rows, capacity);
    const int64_t ld = padded<U>(a.headdim);
    T* dq = reinterpret_cast<T*>(task.dq) + row * ld;
    task.wait(row / a.row_tile);
    if (first <= seen.begin) fill<T>(dq, capacity * ld, T(0));
    for (int64_t key = first; key < end; key += kKeyBlock) {
      if (!g.q.any_sees(key, 0, t.rows)) continue;
      const Block& b = block_at(key);
      const int64_t keys = least(kKeyBlock, s.k_len - key);
      int64_t from = 0;  // rows before it see nothing of the block
      while (!g.q.any_sees(key, from, least(kRowGroup<U>, t.rows - from))) from += kRowGroup<U>;
      for (int64_t begin = from; begin < t.rows; begin += kRowGroup<U>) {
        const int64_t rows = least(kRowGroup<U>, t.rows - begin), columns = round_up(keys, 32);
        T *group_p = p.group(begin), *group_ds = ds.group(begin);
        g.differentiate(begin, rows, key, columns, b.k, b.v, group_p, group_ds);
        p.take(begin, rows);
        ds.take(begin, rows);
        const Left<U> left = over_keys<U>(rows, group_ds, reinterpret_cast<U*>(group_p));
        add_product<U>(rows, ld, units<U>(columns), left, b.k.rows, dq + begin * ld, ld, b.finite,
                       b.k.spare,
                       [&](int64_t r, int64_t j) { return g.q.sees(begin + r, key + j); });
      }
      const auto sees = [&](int64_t j, int64_t r) {
        return from + r < t.rows && g.q.sees(from + r, key + j);
      };
      const auto add = [&](const OverRows<U>& x, const RowPanel<U>& rows, T* to, int64_t width) {
        add_product<U>(keys, width, units<U>(t.rows - from), x.left(from),
                       rows.at + from / kDepth<U> * width, to, width, rows.finite, rows.spare,
                       sees);
      };
      add(p, dout, b.dv, b.v.ld);
      add(ds, q, b.dk, b.k.ld);
    }
    for (int64_t r = 0; seen.end <= end && r < t.rows; ++r)
      store_row<T>(dq + r * ld, 1, a.dq.dtype, a.headdim,
                   a.dq.at(s.q_batch, s.q_begin + g.q.position[r], g.q.head(r)));
    task.done(row / a.row_tile);
  }
  for (int64_t key = first; key < end; ++key) {
    const Block& b = block_at(key);
    const int64_t j = (key - first) % kKeyBlock;
    store_row<T>(b.dk + j * b.k.ld, 1, a.dk.dtype, a.headdim,
                 a.dk.at(s.k_batch, s.k_begin + key, task.head_k));
    store_row<T>(b.dv + j * b.v.ld, 1, a.dv.dtype, a.headdim_v,
                 a.dv.at(s.k_batch, s.k_begin + key, task.head_k));
  }
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
