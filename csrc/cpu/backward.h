// The gradient. P = exp(S - LSE) and dS = P (dP - delta), delta = rowsum(dout out) - dLSE, are
// computed again for dq and for dk and dv, so that each gradient has one owner and no sum depends
// on a schedule.

// delta as the product that dP is: where a row sees one key, dP - delta is then exactly 0.
template <class U>
void backward_delta_(const Attention& a, const RowTile& t, char* scratch) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  const ProductState product_state;
  const Sequence& s = a.sequences[t.sequence];
  const int64_t ld = padded<U>(a.headdim_v) / kDepth<U>;
  Arena arena{scratch};
  U *dout = arena.take<U>(16 * ld), *out = arena.take<U>(ld), *columns = arena.take<U>(ld * L);
  T* delta = arena.take<T>(16 * L);
  for (int64_t r = t.first; r < t.first + t.rows; ++r) {
    const int64_t i = s.q_begin + r / a.group(), head = t.head_k * a.group() + r % a.group();
    fill<U>(dout, ld, U{});
    fill<U>(out, ld, U{});
    load_row(a.dout.at(s.q_batch, i, head), a.dout.dtype, a.headdim_v, dout);
    load_row(a.out.at(s.q_batch, i, head), a.out.dtype, a.headdim_v, out);
    for (int64_t c = 0; c < ld; ++c) fill<U>(columns + c * L, L, out[c]);
    product<U>(1, L, units<U>(a.headdim_v), {dout, ld, 1}, columns, L, delta, L, false);
    if (a.dsoftmax_lse.data) *delta -= a.dsoftmax_lse.at(s.q_batch, i, head);
    *reinterpret_cast<T*>(a.delta.at(s.q_batch, i, head)) = *delta;
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
      lse[r] = a.softmax_lse.at(q.s.q_batch, i, head);
      delta[r] = *reinterpret_cast<const T*>(a.delta.at(q.s.q_batch, i, head));
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
          vec(p + lane) = y;
          vec(ds + lane) = y * (vec(ds + lane) - row_delta) * scale;
        }
      } else {
        differentiate_masked(r, block, columns, p, ds);
      }
    }
  }

  void differentiate_masked(int64_t r, int64_t block, int64_t columns, T* p, T* ds) const {
    for (int64_t lane = 0; lane < columns; lane += kLanes<T>) {
      Vec<T>& p_ = vec(p + lane);
      Vec<T>& ds_ = vec(ds + lane);
      Vec<T> capped;
      const Vec<T> x = q.logits(r, block, lane, p_, &capped);
      const auto masked = x == -T(kInf);  // not even a NaN of the row reaches a masked key
      p_ = masked ? Vec<T>{} : exp_(x - lse[r]);
      Vec<T> gradient = p_ * (ds_ - delta[r]) * T(q.a.softmax_scale);
      if (q.a.softcap > 0) {
        capped /= T(q.a.softcap);
        gradient *= T(1) - capped * capped;
      }
      ds_ = masked ? Vec<T>{} : gradient;
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

template <class U>
void backward_dq_(const Attention& a, const RowTile& t, char* scratch) {
  typedef Sum<U> T;
  const ProductState product_state;
  Arena arena{scratch};
  const GradientTile<U> g(a, t, arena);
  KeyTile<U> k(arena, a.headdim, true, true);
  KeyTile<U> v(arena, a.headdim_v, false, true);
  T* p = arena.take<T>(kRowGroup<U> * kKeyBlock);
  T* ds = arena.take<T>(kRowGroup<U> * kKeyBlock);
  T* dq = arena.take<T>(a.row_capacity() * k.ld);
  fill<T>(dq, a.row_capacity() * k.ld, T(0));
  const Sequence& s = g.q.s;
  for (int64_t block = 0; block < s.k_len; block += kKeyBlock) {
    if (!g.q.any_sees(block, 0, t.rows)) continue;
    const int64_t keys = least(kKeyBlock, s.k_len - block);
    k.load(KeyRows(a, a.k, s, block, keys), a.k, t.head_k);
    v.load(KeyRows(a, a.v, s, block, keys), a.v, t.head_k);
    const bool finite = g.q.all_see(block, 0, t.rows) || k.finite(keys);
    for (int64_t begin = 0; begin < t.rows; begin += kRowGroup<U>) {
      const int64_t rows = least(kRowGroup<U>, t.rows - begin);
      if (!g.q.any_sees(block, begin, rows)) continue;
      const int64_t columns = g.q.columns_of(block, begin, rows);
      g.differentiate(begin, rows, block, columns, k, v, p, ds);
      const Left<U> left = over_keys<U>(rows, ds, reinterpret_cast<U*>(p));
      add_product<U>(rows, k.ld, units<U>(columns), left, k.rows, dq + begin * k.ld, k.ld, finite,
                     k.spare, [&](int64_t r, int64_t j) { return g.q.sees(begin + r, block + j); });
    }
  }
  for (int64_t r = 0; r < t.rows; ++r)
    store_row<T>(dq + r * k.ld, 1, a.dq.dtype, a.headdim,
                 a.dq.at(s.q_batch, s.q_begin + g.q.position[r], g.q.head(r)));
}

// dk and dv of up to kKeyTile keys from `first` on.
template <class U>
void backward_dkdv_(const Attention& a, int64_t sequence, int64_t head_k, int64_t first,
                    char* scratch) {
  typedef Sum<U> T;
  const ProductState product_state;
  const Sequence& s = a.sequences[sequence];
  const int64_t all_rows = s.q_len * a.group(), end = least(first + kKeyTile, s.k_len);
  Arena arena{scratch};
  struct Block {
    KeyTile<U> k, v;
    T *dk, *dv;  // [kKeyBlock][k.ld], [kKeyBlock][v.ld]
    Block(const Attention& a, Arena& arena)
        : k(arena, a.headdim, false, true), v(arena, a.headdim_v, false, true) {
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
    b.k.load(KeyRows(a, a.k, s, key, keys), a.k, head_k);
    b.v.load(KeyRows(a, a.v, s, key, keys), a.v, head_k);
  }
  OverRows<U> p(arena, a.row_capacity()), ds(arena, a.row_capacity());

  for (int64_t row = 0; row < all_rows; row += a.row_tile) {
    const RowTile t{sequence, head_k, row, least(a.row_tile, all_rows - row)};
    const KeyRange seen = visible(a, t);
    if (seen.begin >= end || seen.end <= first) continue;
    Arena tile = arena;
    const GradientTile<U> g(a, t, tile);
    const int64_t capacity = a.row_capacity();
    const RowPanel<U> q(tile, g.q.q, g.q.ld, t.rows, capacity);
    const RowPanel<U> dout(tile, g.dout, g.q.ld_v, t.rows, capacity);
    for (int64_t key = first; key < end; key += kKeyBlock) {
      if (!g.q.any_sees(key, 0, t.rows)) continue;
      Block& b = block_at(key);
      const int64_t keys = least(kKeyBlock, s.k_len - key);
      int64_t from = 0;  // rows before it see nothing of the block
      while (!g.q.any_sees(key, from, least(kRowGroup<U>, t.rows - from))) from += kRowGroup<U>;
      for (int64_t begin = from; begin < t.rows; begin += kRowGroup<U>) {
        const int64_t rows = least(kRowGroup<U>, t.rows - begin);
        g.differentiate(begin, rows, key, round_up(keys, 32), b.k, b.v, p.group(begin),
                        ds.group(begin));
        p.take(begin, rows);
        ds.take(begin, rows);
      }
      const auto sees = [&](int64_t j, int64_t r) {
        return from + r < t.rows && g.q.sees(from + r, key + j);
      };
      const auto add = [&](const OverRows<U>& x, const RowPanel<U>& rows, T* to, int64_t ld) {
        add_product<U>(keys, ld, units<U>(t.rows - from), x.left(from),
                       rows.at + from / kDepth<U> * ld, to, ld, rows.finite, rows.spare, sees);
      };
      add(p, dout, b.dv, b.v.ld);
      add(ds, q, b.dk, b.k.ld);
    }
  }
  for (int64_t key = first; key < end; ++key) {
    const Block& b = block_at(key);
    const int64_t j = (key - first) % kKeyBlock;
    store_row<T>(b.dk + j * b.k.ld, 1, a.dk.dtype, a.headdim,
                 a.dk.at(s.k_batch, s.k_begin + key, head_k));
    store_row<T>(b.dv + j * b.v.ld, 1, a.dv.dtype, a.headdim_v,
                 a.dv.at(s.k_batch, s.k_begin + key, head_k));
  }
}
