// What many rows go through: steps, each of a group of rows and a block of keys.

#pragma once

#include <cstdint>
#include <new>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/operands.h"
#include "cpu/tile/product.h"
#include "cpu/tile/softmax.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

template <class U>
struct Block {
  KeyTile<U> k, v;
  bool finite;
  Block(const Attention& a, Arena& arena)
      : k(a.headdim, false, true, arena), v(a.headdim_v, true, a.qv.data != nullptr, arena) {}
};

template <class U>
struct StepMemory {
  Sum<U>* scores;  // [kRowGroup][kKeyBlock]
  U* p;            // [kRowGroup][kKeyBlock / kDepth]
  Sum<U>* alpha;   // [kRowGroup]

  StepMemory() = default;
  explicit StepMemory(Arena& arena) {
    constexpr int64_t size = kRowGroup<U> * kKeyBlock;
    scores = arena.take<Sum<U>>(size);
    p = kDepth<U> == 1 ? reinterpret_cast<U*>(scores) : arena.take<U>(size / kDepth<U>);
    alpha = arena.take<Sum<U>>(kRowGroup<U>);
  }
};

// The scores of a group of rows and a block of keys, these as P, and what P V adds to the output.
template <class U>
struct Step {
  typedef Sum<U> T;
  static constexpr int64_t L = kLanes<T>;
  const QueryTile<U>* q = nullptr;
  State<T> state;
  StepMemory<U> memory;
  const Block<U>* b = nullptr;
  int64_t begin, rows = 0, block, columns;

  template <class F = Nothing>
  void take_scores(F&& between = F()) const {
    q->scores(begin, rows, columns, b->k, b->v, memory.scores, between);
  }

  INLINE SoftmaxStep<U> softmax(int64_t r) const {
    return {*q,
            state,
            begin + r,
            least(L, rows - r),
            block,
            columns,
            memory.scores + r * kKeyBlock,
            memory.alpha + r,
            memory.p + r * kKeyBlock / kDepth<U>};
  }

  void rescale_output() const {
    for (int64_t r = 0; r < rows; r += L)
      rescale(state, begin + r, least(L, rows - r), memory.alpha + r);
  }

  template <class F = Nothing>
  void add_values(F&& between = F()) const {
    const int64_t seen = least(columns, q->keys[begin + rows - 1].end - block);
    add_product<U>(
        rows, b->v.ld, units<U>(seen), {memory.p, kKeyBlock / kDepth<U>, 1}, b->v.rows,
        state.out + begin * state.ld, state.ld, b->finite, b->v.spare,
        [&](int64_t r, int64_t j) { return q->sees(begin + r, block + j); }, between);
  }
};

#if FA3NPU_AMX
// The softmax of a step, a part of it at each call: first all maxima, then all weights.
template <class U>
class SoftmaxParts {
 public:
  explicit SoftmaxParts(const Step<U>& step) : rows_(step.rows) {
    for (int64_t r = 0; r < rows_; r += L) new (&of_row(r)) SoftmaxStep<U>(step.softmax(r));
  }

  // Whether there was one left.
  __attribute__((noinline)) bool take() {
    if (next_ >= 2 * rows_) return false;
    const bool weighs = next_ >= rows_;
    SoftmaxStep<U>& rows = of_row(weighs ? next_ - rows_ : next_);
    const int64_t first = (weighs ? next_ - rows_ : next_) % L;
    const int64_t end = least(first + kTogether, rows.count);
    for (int64_t i = first; i < end; ++i) weighs ? rows.weigh(i) : rows.take_greatest(i);
    if (end == rows.count) weighs ? rows.add_sums() : rows.raise_maximum();
    next_ += end - first;
    return true;
  }
  void take_maxima() {
    while (next_ < rows_) take();
  }
  void take_rest() {
    while (take()) {
    }
  }

 private:
  static constexpr int64_t L = Step<U>::L, kTogether = 2;

  SoftmaxStep<U>& of_row(int64_t r) { return reinterpret_cast<SoftmaxStep<U>*>(memory_)[r / L]; }

  int64_t rows_, next_ = 0;  // rows whose maxima, then those whose weights have been taken
  alignas(64) char memory_[kRowGroup<U> / L * sizeof(SoftmaxStep<U>)];
};

// Takes steps one after another. Tiles and vectors work at the same time: while one softmax is
// taken, the values of the step before and the scores of the next. The output is rescaled in
// between, long before tiles load it again.
template <class U>
class Steps {
 public:
  explicit Steps(Arena& arena) : memory_{StepMemory<U>(arena), StepMemory<U>(arena)} {}

  const StepMemory<U>& memory() const { return memory_[turn_ ^ 1]; }

  void take(const Step<U>& next) {
    const Step<U>& current = last_[turn_];
    SoftmaxParts<U> softmax(current);
    const auto between = [&]() INLINE_LAMBDA { softmax.take(); };
    Step<U>& other = last_[turn_ ^= 1];
    if (other.rows > 0) other.add_values(between);
    softmax.take_maxima();
    current.rescale_output();
    other = next;
    if (other.rows > 0) other.take_scores(between);
    softmax.take_rest();
  }

  void finish() {
    take({});
    take({});
  }

 private:
  StepMemory<U> memory_[2];
  Step<U> last_[2];
  int64_t turn_ = 0;
};
#else
template <class U>
class Steps {
 public:
  explicit Steps(Arena& arena) : memory_(arena) {}
  const StepMemory<U>& memory() const { return memory_; }

  void take(const Step<U>& step) {
    step.take_scores();
    for (int64_t r = 0; r < step.rows; r += Step<U>::L) step.softmax(r).take_all();
    step.rescale_output();
    step.add_values();
  }
  void finish() {}

 private:
  StepMemory<U> memory_;
};
#endif

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
