// The forward pass: the online softmax of a tile of query rows over one chunk of keys, and what
// becomes of the partial results.

// A partial result of a row tile: maximum, sum and unscaled output of each row.
template <class T>
struct State {
  T *maximum, *sum, *out;
  int64_t ld;
  State(const Attention& a, char* at) : ld(a.state_ld()) {
    Arena arena{at};
    maximum = arena.take<T>(a.row_capacity());
    sum = arena.take<T>(a.row_capacity());
    out = arena.take<T>(a.row_capacity() * ld);
  }
};

template <class T>
void empty_state_(const Attention& a, char* at) {
  const State<T> state(a, at);
  fill<T>(state.maximum, a.row_capacity(), -T(kInf));
  fill<T>(state.sum, a.row_capacity(), T(0));
  fill<T>(state.out, a.row_tile * state.ld, T(0));
}

// A row's sums stay relative to an old maximum until the new one is this much greater: e^8 of head
// room costs no precision and saves most rescaling.
constexpr float kSlack = 8;

// One step of the online softmax for `count` rows from `first`, at most as many as a vector has
// lanes: their scores become probabilities relative to the new maximum, and what was summed before
// is rescaled. A block that a row does not see changes nothing of it.
template <class U>
INLINE void softmax_step(const QueryTile<U>& q, int64_t first, int64_t count, int64_t block,
                         int64_t columns, Sum<U>* scores, U* p, const State<Sum<U>>& state) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  const T scale = T(q.a.softmax_scale);
  Vec<T> x[L];  // by row: its greatest logits, then its sums
  for (int64_t i = 0; i < L; ++i) x[i] = Vec<T>{} - T(kInf);
  for (int64_t i = 0; i < count; ++i) {
    T* row = scores + i * kKeyBlock;
    Vec<T> greatest = x[i];
    const auto take = [&](const auto& logits) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < columns; lane += L) {
        const Vec<T> y = logits(lane, vec(row + lane));
        vec(row + lane) = y;
        greatest = y > greatest ? y : greatest;
      }
    };
    if (q.plain(first + i, block))
      take([&](int64_t, const Vec<T>& score) INLINE_LAMBDA { return score * scale; });
    else
      take([&](int64_t lane, const Vec<T>& score) {
        return q.logits(first + i, block, lane, score);
      });
    x[i] = greatest;
  }
  Vec<T>& maximum = vec(state.maximum + first);
  const Vec<T> before = maximum, top = maxima<T>(x), none = Vec<T>{} - T(kInf);
  maximum = top > before + T(kSlack) ? top : before;
  T base[L], alpha[L];
  vec(base) = maximum == none ? Vec<T>{} : maximum;  // -inf - -inf would be NaN
  vec(alpha) = before == none ? Vec<T>{} + T(1) : exp_(before - vec(base));

  for (int64_t i = 0; i < L; ++i) x[i] = Vec<T>{};
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> total{};
    const T b = base[i];
#pragma GCC unroll 2
    for (int64_t j = i * kKeyBlock; j < i * kKeyBlock + columns; j += 2 * L) {
      const Vec<T> y = exp_(vec(scores + j) - b), z = exp_(vec(scores + j + L) - b);
      narrow(y, z, p + j / kDepth<U>);
      total += y;
      total += z;
    }
    x[i] = total;
  }
  vec(state.sum + first) = vec(state.sum + first) * vec(alpha) + sums<T>(x);
  for (int64_t i = 0; i < count; ++i) {
    if (alpha[i] == T(1)) continue;
    T* out = state.out + (first + i) * state.ld;
    for (int64_t c = 0; c < state.ld; c += L) vec(out + c) *= alpha[i];
  }
}

// Asks for the keys and values of [begin, end) ahead of their use, in even portions and token by
// token: heads of a token lie together, and the hardware follows only what is read in order.
struct Prefetch {
  const Attention& a;
  const RowTile& tile;
  int64_t count, begin, end, portions, done = 0;

  void next() {
    const int64_t size = end - begin, from = begin + size * done / portions;
    const int64_t to = begin + size * ++done / portions;
    for (int64_t j = from; j < to; ++j) {
      row(a.k, j, a.headdim);
      row(a.v, j, a.headdim_v);
    }
  }

 private:
  void row(const Rows& cache, int64_t j, int64_t width) const {
    const char* at = a.key_row(cache, a.sequences[tile.sequence], j, tile.head_k);
    const int64_t bytes = width * cache.element;
    if (cache.head == bytes) return lines(at, count * bytes);
    for (int64_t i = 0; i < count; ++i) lines(at + i * cache.head, bytes);
  }
  static void lines(const char* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

// `count` tiles of one sequence and the same rows, of neighbouring KV heads: a few blocks of keys
// at a time, so that the heads of a token, which lie together, are read together.
template <class U>
void forward_chunk_(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                    char* states, char* scratch) {
  typedef Sum<U> T;
  const ProductState product_state;
  Arena arena{scratch};
  auto* q = reinterpret_cast<QueryTile<U>*>(arena.take<char>(count * sizeof(QueryTile<U>)));
  const bool few = by_keys(a, tiles[0].rows);
  for (int64_t i = 0; i < count; ++i) {
    new (q + i) QueryTile<U>(a, tiles[i], arena);
    if (few) q[i].take_columns(arena);
    empty_state_<T>(a, states + i * state_bytes(a));
  }
  struct Block {
    KeyTile<U> k, v;
    KeyRows k_rows, v_rows;
    bool finite;
    Block(const Attention& a, Arena& arena)
        : k(arena, a.headdim, false, true), v(arena, a.headdim_v, true, a.qv.data != nullptr) {}
  };
  // Many rows load their state once for all blocks of a panel; few leave a block in cache.
  const int64_t panel_blocks = q->rows > kRowGroup<U> ? kPanelBlocks : 1;
  auto* blocks = reinterpret_cast<Block*>(arena.take<char>(kPanelBlocks * sizeof(Block)));
  for (int64_t n = 0; n < panel_blocks; ++n) new (blocks + n) Block(a, arena);
  T* scores = arena.take<T>(kRowGroup<U> * kKeyBlock);
  constexpr int64_t p_ld = kKeyBlock / kDepth<U>;
  U* p = reinterpret_cast<U*>(scores);
  if constexpr (kDepth<U> > 1) p = arena.take<U>(kRowGroup<U> * p_ld);

  const Sequence& s = q->s;
  const int64_t end = least((chunk + 1) * kChunk, s.k_len);
  const auto blocks_from = [&](int64_t panel, const auto& work) {
    for (int64_t n = 0, block = panel; n < panel_blocks && block < end; ++n, block += kKeyBlock)
      work(blocks[n], block, least(kKeyBlock, end - block));
  };
  const int64_t panel_keys = panel_blocks * kKeyBlock;
  const int64_t last = least(s.k_len, visible(a, tiles[0]).end);
  for (int64_t panel = chunk * kChunk; panel < end; panel += panel_keys) {
    Prefetch prefetch{a,
                      tiles[0],
                      count,
                      least(panel + panel_keys, last),
                      least(panel + 2 * panel_keys, last),
                      count * ((q->rows + kRowGroup<U> - 1) / kRowGroup<U>)};
    for (int64_t i = 0; i < count; ++i) {
      blocks_from(panel, [&](Block& b, int64_t block, int64_t keys) {
        if (!q->any_sees(block, 0, q->rows)) return;
        if (i == 0) {
          b.k_rows = KeyRows(a, a.k, s, block, keys);
          b.v_rows = KeyRows(a, a.v, s, block, keys);
        }
        if (!few) b.k.load(b.k_rows, a.k, tiles[i].head_k);
        b.v.load(b.v_rows, a.v, tiles[i].head_k);
        b.finite = q->all_see(block, 0, q->rows) || b.v.finite(keys);
      });
      const State<T> state(a, states + i * state_bytes(a));
      for (int64_t begin = 0; begin < q->rows; begin += kRowGroup<U>) {
        const int64_t rows = least(kRowGroup<U>, q->rows - begin);
        T* out = state.out + begin * state.ld;
        prefetch.next();
        blocks_from(panel, [&](const Block& b, int64_t block, int64_t) {
          if (!q->any_sees(block, begin, rows)) return;
          const int64_t columns = q->columns_of(block, begin, rows);
          if (few)
            q[i].scores_by_keys(b.k_rows, a.k, columns, b.k.transposed, scores);
          else
            q[i].scores(begin, rows, columns, b.k, b.v, scores);
          for (int64_t r = 0; r < rows; r += kLanes<T>)
            softmax_step(q[i], begin + r, least(kLanes<T>, rows - r), block, columns,
                         scores + r * kKeyBlock, p + r * p_ld, state);
          add_product<U>(rows, b.v.ld, units<U>(columns), {p, p_ld, 1}, b.v.rows, out, state.ld,
                         b.finite, b.v.spare,
                         [&](int64_t r, int64_t j) { return q->sees(begin + r, block + j); });
        });
      }
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
