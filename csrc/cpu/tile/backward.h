// The gradient: P = exp(S - LSE), dS = P (dP - delta) and delta = rowsum(dout out) - dLSE. dk and
// dv of a tile of keys are one thread's; to dq the tiles of keys add in turn. So no sum depends on
// a schedule.

#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/operands.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

template <class U>
struct DeltaScratch {
  typedef Sum<U> T;
  static constexpr int64_t L = kLanes<T>;
  int64_t ld;
  U *dout, *out, *columns;  // [16][ld], [L][ld] and its transpose
  T* products;              // [16][L], of every row with every row: the diagonal counts

  DeltaScratch(const Attention& a, Arena& arena) : ld(padded<U>(a.headdim_v) / kDepth<U>) {
    dout = arena.take<U>(16 * ld);
    out = arena.take<U>(L * ld);
    columns = arena.take<U>(ld * L);
    products = arena.take<T>(16 * L);
  }
};

// delta of some positions as the product that dP is: where a row sees one key, dP - delta is then
// exactly 0. A row that sees nothing has its dq here.
template <class U>
void backward_delta(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                    Memory scratch) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  const ProductState product_state;
  const Sequence& s = a.sequences[sequence];
  Arena arena(scratch);
  const DeltaScratch<U> own(a, arena);
  const int64_t ld = own.ld;
  U *const dout = own.dout, *const out = own.out, *const columns = own.columns;
  T* const products = own.products;
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

  GradientTile(const Attention& a, Arena& arena) : q(a, arena) {
    dout = arena.take<U>(a.row_capacity() * q.ld_v);
    lse = arena.take<T>(a.row_tile);
    delta = arena.take<T>(a.row_tile);
  }

  void load(const RowTile& t) {
    q.load(t);
    const Attention& a = q.a;
    q.worth = {};  // beside softmax_lse logits are natural
    q.worth.scale = quiet(T(a.softmax_scale));
    const Sequence& s = *q.s;
    constexpr int64_t kAhead = 8;
    for (int64_t r = 0; r < q.rows; ++r) {
      const int64_t i = s.q_begin + q.position[r], head = q.head(r);
      if (r + kAhead < q.rows)
        prefetch(a.dout.at(s.q_batch, s.q_begin + q.position[r + kAhead], q.head(r + kAhead)),
                 a.headdim_v * a.dout.element);
      q.load_q(a.dout, q.position[r], head, a.headdim_v, q.ld_v, 1, dout + r * q.ld_v);
      lse[r] = quiet(a.softmax_lse.at(s.q_batch, i, head));
      delta[r] = quiet(*reinterpret_cast<const T*>(a.delta.at(s.q_batch, i, head)));
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
      } else if (q.sees_all(r, block) && q.a.softcap <= 0 && q.slope[r] == 0) {
        const Worth<T> worth = q.worth;  // which stores might change, for all the compiler knows
        const T scale = worth.scale, row_lse = lse[r], row_delta = delta[r];
        for (int64_t lane = 0; lane < columns; lane += kLanes<T>) {
          const Vec<T> y = worth.template exp<U>(vec(p + lane) * scale - row_lse);
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
      const Vec<T> y = masked ? Vec<T>{} : q.worth.template exp<U>(x - lse[r]);
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

// dS of Pairs, of a tile of rows and some blocks of keys, as the left side of one product, which
// loads and stores its sums once for all of them.
template <class U>
struct OverKeys {
  static constexpr int64_t kBlocks = kDepth<U> == 1 ? 1 : 256 / kKeyBlock;
  static constexpr int64_t kWidth = kKeyBlock / kDepth<U>, ld = kBlocks * kWidth;
  U* narrowed;  // [row][ld]

  OverKeys(int64_t rows, Arena& arena)
      : narrowed(kBlocks == 1 ? nullptr : arena.take<U>(rows * ld)) {}

  void take(int64_t begin, int64_t rows, int64_t block, const Sum<U>* ds) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < kWidth; j += kLanes<U>, ds += 2 * kLanes<U>)
        narrow(vec(ds), vec(ds + kLanes<U>), narrowed + (begin + r) * ld + block * kWidth + j);
  }
};

// P or dS of a tile of rows, group by group, as the left side of a product summed over rows: of
// Pairs, a transpose.
template <class U>
struct OverRows {
  typedef Sum<U> T;
  T* values;      // [row][kKeyBlock]; of Pairs, those of one group
  U* transposed;  // [key][ld], of Pairs
  int64_t ld;

  OverRows(int64_t rows, Arena& arena) : ld(rows / kDepth<U>) {
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
  int64_t ld, capacity;
  U *spare, *panel;  // the panel: of Pairs
  const U* at = nullptr;
  bool finite = false;

  RowPanel(int64_t ld, int64_t capacity, Arena& arena) : ld(ld), capacity(capacity) {
    spare = arena.take<U>(capacity * ld);
    panel = kDepth<U> == 2 ? arena.take<U>(capacity * ld) : nullptr;
  }

  void load(const U* rows, int64_t count) {
    at = rows;
    if constexpr (kDepth<U> == 2) {
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
template <class U>  // rows that a transpose of Pairs and a step of tiles take whole
constexpr int64_t kRowStep = kDepth<U> == 2 ? 32 : kRowGroup<U>;

template <class U>
int64_t dq_bytes(const Attention& a) {  // a row tile's, [row][padded headdim]
  return a.row_capacity() * padded<U>(a.headdim) * int64_t(sizeof(Sum<U>));
}

// A tile of keys with the sums of its dk and dv, and what a tile of rows adds to them and to dq.
template <class U>
struct KeyGradients {
  typedef Sum<U> T;

  struct Block {
    KeyTile<U> k, v;
    T *dk, *dv;        // [kKeyBlock][k.ld], [kKeyBlock][v.ld]
    int64_t from = 0;  // rows before it see nothing of the block
    bool finite = false;
    Block(const Attention& a, Arena& arena)
        : k(a.headdim, false, true, arena), v(a.headdim_v, false, true, arena) {
      dk = arena.take<T>(kKeyBlock * k.ld);
      dv = arena.take<T>(kKeyBlock * v.ld);
    }
  };

  const Attention& a;
  Block* blocks;
  U *k_rows, *spare;  // the rows of K of all blocks, and a copy of some
  OverKeys<U> ds_over_keys;
  OverRows<U> p, ds;
  GradientTile<U> rows;
  RowPanel<U> q, dout;

  KeyGradients(const Attention& a, Arena& arena)
      : a(a),
        blocks(arena.make<Block>(kKeyTile / kKeyBlock, a)),
        k_rows(arena.take<U>(kKeyTile / kDepth<U> * padded<U>(a.headdim))),
        spare(arena.take<U>(OverKeys<U>::ld * padded<U>(a.headdim))),
        ds_over_keys(a.row_capacity(), arena),
        p(a.row_capacity(), arena),
        ds(a.row_capacity(), arena),
        rows(a, arena),
        q(rows.q.ld, a.row_capacity(), arena),
        dout(rows.q.ld_v, a.row_capacity(), arena) {
    for (int64_t i = 0; blocks && i < kKeyTile / kKeyBlock; ++i)
      blocks[i].k.rows = k_rows + i * OverKeys<U>::kWidth * blocks[i].k.ld;
  }

  // work(block, its first key, their number)
  template <class Work>
  void each_block(const KeyTask& task, const Work& work) const {
    const int64_t all = a.sequences[task.sequence].k_len;
    Block* block = blocks;
    for (int64_t key = task.first; key < task.end; key += kKeyBlock)
      work(*block++, key, least(kKeyBlock, all - key));
  }

  void load(const KeyTask& task) const {
    const Sequence& s = a.sequences[task.sequence];
    each_block(task, [&](Block& b, int64_t key, int64_t keys) {
      fill<T>(b.dk, kKeyBlock * b.k.ld, T(0));
      fill<T>(b.dv, kKeyBlock * b.v.ld, T(0));
      b.k.load(KeyRows(a, a.k, s, key, keys), a.k, task.head_k);
      b.v.load(KeyRows(a, a.v, s, key, keys), a.v, task.head_k);
      b.finite = b.k.finite(keys);
    });
  }

  void add_rows(const KeyTask& task, const RowTile& t) {
    const KeyRange seen = visible(a, t);
    if (seen.begin >= least(seen.end, task.end) || seen.end <= task.first) return;
    rows.load(t);
    q.load(rows.q.q, t.rows);
    dout.load(rows.dout, t.rows);
    const int64_t tile = t.first / a.row_tile, bytes = dq_bytes<U>(a);
    T* const dq = reinterpret_cast<T*>(task.dq.part(tile, bytes).at);
    task.wait(tile);
    if (task.first <= seen.begin) __builtin_memset(dq, 0, bytes);
    const Block* first = nullptr;  // of those whose dS wait for dq
    int64_t first_key = 0, waiting = 0, columns = 0;
    const auto add_waiting = [&] {
      if (waiting > 0) add_dq_of(first, first_key, waiting, columns, dq);
      waiting = 0;
    };
    each_block(task, [&](Block& b, int64_t key, int64_t keys) {
      if (!rows.q.any_sees(key, 0, t.rows)) return;
      if (waiting == 0) first = &b, first_key = key;
      columns = waiting * kKeyBlock + round_up(keys, 32);
      add_block(b, key, keys, waiting, dq);
      if (OverKeys<U>::kBlocks > 1 && ++waiting == OverKeys<U>::kBlocks) add_waiting();
    });
    add_waiting();
    if (seen.end <= task.end) store_dq(dq);
    task.done(tile);
  }

  // The block's dk and dv; its dS add to dq, or are the `waiting`th to do so.
  void add_block(Block& b, int64_t key, int64_t keys, int64_t waiting, T* dq) {
    const QueryTile<U>& r = rows.q;
    const int64_t columns = round_up(keys, 32);
    int64_t from = 0;
    while (!r.any_sees(key, from, least(kRowStep<U>, r.rows - from))) from += kRowStep<U>;
    b.from = from;
    for (int64_t begin = from; begin < r.rows; begin += kRowGroup<U>) {
      const int64_t count = least(kRowGroup<U>, r.rows - begin);
      T *group_p = p.group(begin), *group_ds = ds.group(begin);
      rows.differentiate(begin, count, key, columns, b.k, b.v, group_p, group_ds);
      p.take(begin, count);
      ds.take(begin, count);
      if constexpr (OverKeys<U>::kBlocks == 1)
        add_dq(begin, count, {group_ds, kKeyBlock, 1}, b, key, columns, b.finite, dq);
      else
        ds_over_keys.take(begin, count, waiting, group_ds);
    }
    const auto sees = [&](int64_t j, int64_t i) {
      return from + i < r.rows && r.sees(from + i, key + j);
    };
    const auto add = [&](const OverRows<U>& x, const RowPanel<U>& y, T* to, int64_t width) {
      add_product<U>(keys, width, units<U>(r.rows - from), x.left(from),
                     y.at + from / kDepth<U> * width, to, width, y.finite, y.spare, sees);
    };
    add(p, dout, b.dv, b.v.ld);
    add(ds, q, b.dk, b.k.ld);
  }

  void add_dq(int64_t from, int64_t count, const Left<U>& left, const Block& b, int64_t key,
              int64_t columns, bool finite, T* dq) const {
    add_product<U>(count, b.k.ld, units<U>(columns), left, b.k.rows, dq + from * b.k.ld, b.k.ld,
                   finite, spare,
                   [&](int64_t row, int64_t j) { return rows.q.sees(from + row, key + j); });
  }

  // Of `count` blocks from b. Later rows see later keys.
  void add_dq_of(const Block* b, int64_t key, int64_t count, int64_t columns, T* dq) const {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      finite &= b[i].finite;
      const bool ends = i + 1 == count;
      const int64_t from = b[i].from, end = ends ? rows.q.rows : b[i + 1].from;
      if (from < end)
        add_dq(from, end - from,
               {ds_over_keys.narrowed + from * OverKeys<U>::ld, OverKeys<U>::ld, 1}, *b, key,
               ends ? columns : (i + 1) * kKeyBlock, finite, dq);
    }
  }

  void store_dq(const T* dq) const {
    const QueryTile<U>& r = rows.q;
    for (int64_t i = 0; i < r.rows; ++i, dq += padded<U>(a.headdim))
      store_row<T>(dq, 1, a.dq.dtype, a.headdim,
                   a.dq.at(r.s->q_batch, r.s->q_begin + r.position[i], r.head(i)));
  }

  void store(const KeyTask& task) const {
    const Sequence& s = a.sequences[task.sequence];
    each_block(task, [&](const Block& b, int64_t key, int64_t) {
      const int64_t keys = least(kKeyBlock, task.end - key);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t row = s.k_begin + key + j;
        store_row<T>(b.dk + j * b.k.ld, 1, a.dk.dtype, a.headdim,
                     a.dk.at(s.k_batch, row, task.head_k));
        store_row<T>(b.dv + j * b.v.ld, 1, a.dv.dtype, a.headdim_v,
                     a.dv.at(s.k_batch, row, task.head_k));
      }
    });
  }
};

template <class U>
int64_t backward_bytes(const Attention& a) {
  return greater(bytes_of<DeltaScratch<U>>(a), bytes_of<KeyGradients<U>>(a));
}

template <class U>
void backward_keys(const Attention& a, const KeyTask& task, Memory scratch) {
  const ProductState product_state;
  Arena arena(scratch);
  KeyGradients<U> gradients(a, arena);
  gradients.load(task);
  const int64_t rows = a.rows(task.sequence);
  for (int64_t row = 0; row < rows; row += a.row_tile)
    gradients.add_rows(task, {task.sequence, task.head_k, row, least(a.row_tile, rows - row)});
  gradients.store(task);
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
