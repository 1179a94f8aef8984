// The online softmax, and the partial results it sums.

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

// A row's sums stay relative to an old maximum until the new one is this much greater, which saves
// most rescaling. Of float32 that costs no precision. P in bfloat16 is relative to the greatest
// score so far: a row's greatest weight is then 1 and not rounded.
template <class U>
constexpr Sum<U> kSlack = kDepth<U> == 1 ? 8 : 0;

// One step of the online softmax for `count` rows from `first`, at most as many as a vector has
// lanes: their scores become probabilities relative to the new maximum, and what was summed before
// is rescaled. A block that a row does not see changes nothing of it.
template <class U>
INLINE void softmax_step(const QueryTile<U>& q, int64_t first, int64_t count, int64_t block,
                         int64_t columns, Sum<U>* scores, U* p, const State<Sum<U>>& state) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  Vec<T> x[L];  // by row: its greatest logits, then its sums
  T factor[L];  // by row: what its logits are still to be multiplied by
  for (int64_t i = 0; i < L; ++i) x[i] = splat(-T(kInf)), factor[i] = 1;
  for (int64_t i = 0; i < count; ++i) {
    T* row = scores + i * kKeyBlock;
    if (q.plain(first + i, block)) {
      factor[i] = T(q.a.softmax_scale);
      Vec<T> even = x[i], odd = x[i];
      for (int64_t lane = 0; lane < columns; lane += 2 * L) {
        even = greater(even, vec(row + lane));
        odd = greater(odd, vec(row + lane + L));
      }
      x[i] = greater(even, odd);
    } else {
      for (int64_t lane = 0; lane < columns; lane += L) {
        const Vec<T> y = q.logits(first + i, block, lane, vec(row + lane));
        store(row + lane, y);
        x[i] = greater(x[i], y);
      }
    }
  }
  const Vec<T> before = vec(state.maximum + first), top = maxima<T>(x) * vec(factor);
  const Vec<T> none = splat(-T(kInf));
  const Vec<T> maximum = top > before + kSlack<U> ? top : before;
  store(state.maximum + first, maximum);
  T base[L], alpha[L];
  store(base, maximum == none ? Vec<T>{} : maximum);  // -inf - -inf would be NaN
  store(alpha, before == none ? splat(T(1)) : exp_(before - vec(base)));

  for (int64_t i = 0; i < L; ++i) x[i] = Vec<T>{};
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> total{};
    const Vec<T> scale = splat(factor[i]), shift = splat(-base[i]);
#pragma GCC unroll 2
    for (int64_t j = i * kKeyBlock; j < i * kKeyBlock + columns; j += 2 * L) {
      const Vec<T> y = exp_(multiply_add(vec(scores + j), scale, shift));
      const Vec<T> z = exp_(multiply_add(vec(scores + j + L), scale, shift));
      narrow(y, z, p + j / kDepth<U>);
      total += y;
      total += z;
    }
    x[i] = total;
  }
  store(state.sum + first, multiply_add(vec(state.sum + first), vec(alpha), sums<T>(x)));
  for (uint64_t rows = lanes_unlike(vec(alpha), T(1)); rows != 0; rows &= rows - 1) {
    const int64_t i = __builtin_ctzll(rows);
    T* out = state.out + (first + i) * state.ld;
    for (int64_t c = 0; c < state.ld; c += L) store(out + c, vec(out + c) * alpha[i]);
  }
}
