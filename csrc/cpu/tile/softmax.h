// The online softmax, and the partial results it sums.

#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/operands.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

// A partial result of a row tile: maximum, sum and unscaled output of each row.
template <class T>
struct State {
  T *maximum, *sum, *out;
  int64_t ld;

  State() = default;
  State(const Attention& a, Arena& arena) : ld(round_up(a.headdim_v, 32)) {
    maximum = arena.take<T>(a.row_capacity());
    sum = arena.take<T>(a.row_capacity());
    out = arena.take<T>(a.row_capacity() * ld);
  }
  State(const Attention& a, Memory memory) {
    Arena arena(memory);
    *this = State(a, arena);
  }
};

template <class T>
int64_t state_bytes(const Attention& a) {
  return bytes_of<State<T>>(a);
}

template <class T>
void empty_state(const Attention& a, Memory memory) {
  const State<T> state(a, memory);
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
// lanes, in parts: their scores become probabilities relative to the new maximum. What was summed
// before is to be rescaled by alpha. A block that a row does not see changes nothing of it.
template <class U>
struct SoftmaxStep {
  typedef Sum<U> T;
  static constexpr int64_t L = kLanes<T>;
  const QueryTile<U>* q;
  State<T> state;
  int64_t first, count, block, columns;
  T *scores, *alpha;  // [count][kKeyBlock], [L]
  U* p;
  Vec<T> x[L];  // by row: its greatest logits, then its sums
  T base[L];

  INLINE SoftmaxStep(const QueryTile<U>& q, const State<T>& state, int64_t first, int64_t count,
                     int64_t block, int64_t columns, T* scores, T* alpha, U* p)
      : q(&q),
        state(state),
        first(first),
        count(count),
        block(block),
        columns(columns),
        scores(scores),
        alpha(alpha),
        p(p) {}

  INLINE void take_greatest(int64_t i) {
    T* const row = scores + i * kKeyBlock;
    Vec<T> greatest = splat(-T(kInf));
    const auto take = [&, end = columns](const auto& logits) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < end; lane += L) {
        const Vec<T> y = logits(lane);
        greatest = y > greatest ? y : greatest;
      }
    };
    if (!q->worth.scaled && q->sees_all(first + i, block))
      take([row](int64_t lane) INLINE_LAMBDA { return vec(row + lane); });
    else
      take([&](int64_t lane) {
        const Vec<T> y = q->logits(first + i, block, lane, vec(row + lane));
        store(row + lane, y);
        return y;
      });
    x[i] = greatest;
  }

  INLINE void raise_maximum() {
    for (int64_t i = count; i < L; ++i) x[i] = splat(-T(kInf));
    const Vec<T> before = vec(state.maximum + first), top = maxima<T>(x), none = splat(-T(kInf));
    const Vec<T> maximum = top > before + kSlack<U> / q->worth.unit ? top : before;
    store(state.maximum + first, maximum);
    store(base, maximum == none ? Vec<T>{} : maximum);  // -inf - -inf would be NaN
    store(alpha, before == none ? Vec<T>{} + T(1) : q->worth.template exp<T>(before - vec(base)));
  }

  INLINE void weigh(int64_t i) {
    const T* const row = scores + i * kKeyBlock;
    U* const weights = p + i * kKeyBlock / kDepth<U>;
    const T b = base[i];
    const Worth<T> worth = q->worth;  // which stores might change, for all the compiler knows
    const auto weight = [&](int64_t j)
                            INLINE_LAMBDA { return worth.template exp<U>(vec(row + j) - b); };
    Vec<T> total{};
#pragma GCC unroll 4
    for (int64_t j = 0, end = columns; j < end; j += kDepth<U> * L) {
      const Vec<T> y = weight(j);
      total += y;
      if constexpr (kDepth<U> == 1) {
        store(weights + j, y);
      } else {
        const Vec<T> z = weight(j + L);
        narrow(y, z, weights + j / kDepth<U>);
        total += z;
      }
    }
    x[i] = total;
  }

  INLINE void add_sums() {
    for (int64_t i = count; i < L; ++i) x[i] = Vec<T>{};
    store(state.sum + first, multiply_add(vec(state.sum + first), vec(alpha), sums<T>(x)));
  }

  INLINE void take_all() {
    for (int64_t i = 0; i < count; ++i) take_greatest(i);
    raise_maximum();
    for (int64_t i = 0; i < count; ++i) weigh(i);
    add_sums();
  }
};

template <class T>
INLINE void rescale(const State<T>& state, int64_t first, int64_t count, const T* alpha) {
  constexpr int64_t L = kLanes<T>;
  int64_t rescaled[L], n = 0;  // found without a branch, which would often be mispredicted
  for (int64_t i = 0; i < count; ++i) {
    rescaled[n] = i;
    n += alpha[i] != T(1);
  }
  for (int64_t k = 0; k < n; ++k) {
    T* out = state.out + (first + rescaled[k]) * state.ld;
    for (int64_t c = 0; c < state.ld; c += L) store(out + c, vec(out + c) * alpha[rescaled[k]]);
  }
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
