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
// lanes: their scores become probabilities relative to the new maximum, and what was summed before
// is rescaled. A block that a row does not see changes nothing of it.
template <class U>
INLINE void softmax_step(const QueryTile<U>& q, int64_t first, int64_t count, int64_t block,
                         int64_t columns, Sum<U>* scores, U* p, const State<Sum<U>>& state) {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<T>;
  const T scale = q.scale;
  Vec<T> x[L];  // by row: its greatest logits, then its sums
  for (int64_t i = 0; i < L; ++i) x[i] = Vec<T>{} - T(kInf);
  for (int64_t i = 0; i < count; ++i) {
    T* row = scores + i * kKeyBlock;
    Vec<T> greatest = x[i];
    const auto take = [&](const auto& logits) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int64_t lane = 0; lane < columns; lane += L) {
        const Vec<T> y = logits(lane, vec(row + lane));
        store(row + lane, y);
        greatest = y > greatest ? y : greatest;
      }
    };
    if (q.only_scaled(first + i, block))
      take([&](int64_t, const Vec<T>& score) INLINE_LAMBDA { return score * scale; });
    else
      take([&](int64_t lane, const Vec<T>& score) {
        return q.logits(first + i, block, lane, score);
      });
    x[i] = greatest;
  }
  const Vec<T> before = vec(state.maximum + first), top = maxima<T>(x), none = splat(-T(kInf));
  const Vec<T> maximum = top > before + kSlack<U> ? top : before;
  store(state.maximum + first, maximum);
  T base[L], alpha[L];
  store(base, maximum == none ? Vec<T>{} : maximum);  // -inf - -inf would be NaN
  store(alpha, before == none ? Vec<T>{} + T(1) : exp_(before - vec(base)));

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
  store(state.sum + first, multiply_add(vec(state.sum + first), vec(alpha), sums<T>(x)));
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
