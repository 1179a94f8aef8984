// The forward pass: attention of a tile of query rows to one chunk of keys, and what becomes of the
// partial results.

#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/decode.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/operands.h"
#include "cpu/tile/softmax.h"
#include "cpu/tile/steps.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

template <class U>
struct ForwardScratch {
  QueryTile<U> q;
  Block<U>* blocks;  // of a panel
  Steps<U> steps;

  ForwardScratch(const Attention& a, Arena& arena)
      : q(a, arena), blocks(arena.make<Block<U>>(kPanelBlocks, a)), steps(arena) {}
};

template <class U>
int64_t forward_bytes(const Attention& a) {
  return greater(bytes_of<FewScratch<U>>(a, a.together), bytes_of<ForwardScratch<U>>(a));
}

template <class U>
void forward_chunk(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                   Memory states, Memory scratch) {
  if (few_rows(a, tiles[0].rows)) return forward_few<U>(a, tiles, count, chunk, states, scratch);

  const ProductState product_state;
  Arena arena(scratch);
  ForwardScratch<U> own(a, arena);
  const RowTile& tile = tiles[0];
  own.q.load(tile);
  const QueryTile<U>& q = own.q;
  empty_state<Sum<U>>(a, states);
  const State<Sum<U>> state(a, states);
  // Many rows load their state once for all blocks of a panel; few leave a block in cache.
  const int64_t panel_blocks = q.rows > kRowGroup<U> ? kPanelBlocks : 1;
  const Sequence& s = *q.s;
  const int64_t end = least((chunk + 1) * kChunk, s.k_len);
  const auto blocks_from = [&](int64_t panel, const auto& work) {
    for (int64_t n = 0, block = panel; n < panel_blocks && block < end; ++n, block += kKeyBlock)
      work(own.blocks[n], block, least(kKeyBlock, end - block));
  };
  const int64_t panel_keys = panel_blocks * kKeyBlock;
  for (int64_t panel = chunk * kChunk; panel < end; panel += panel_keys) {
    blocks_from(panel, [&](Block<U>& b, int64_t block, int64_t keys) {
      if (!q.any_sees(block, 0, q.rows)) return;
      b.k.load(KeyRows(a, a.k, s, block, keys), a.k, tile.head_k);
      b.v.load(KeyRows(a, a.v, s, block, keys), a.v, tile.head_k);
      b.finite = q.all_see(block, 0, q.rows) || b.v.finite(keys);
    });
    for (int64_t begin = 0; begin < q.rows; begin += kRowGroup<U>) {
      const int64_t rows = least(kRowGroup<U>, q.rows - begin);
      blocks_from(panel, [&](const Block<U>& b, int64_t block, int64_t) {
        if (q.any_sees(block, begin, rows))
          own.steps.take({&q, state, own.steps.memory(), &b, begin, rows, block,
                          q.columns_of(block, begin, rows, 16 * kDepth<U>)});
      });
    }
    own.steps.finish();
  }
}

template <class T>
void merge_state(const Attention& a, const RowTile& t, Memory into_, Memory from_) {
  const State<T> into(a, into_), from(a, from_);
  const Worth<T> worth(a, t.sequence, t.head_k);
  for (int64_t r = 0; r < t.rows; ++r) {
    const T maximum = greater(into.maximum[r], from.maximum[r]);
    const T base = maximum == -T(kInf) ? T(0) : maximum;
    const T alpha = worth.template exp<T>(into.maximum[r] - base),
            beta = worth.template exp<T>(from.maximum[r] - base);
    into.maximum[r] = maximum;
    into.sum[r] = into.sum[r] * alpha + from.sum[r] * beta;
    for (int64_t c = r * into.ld; c < (r + 1) * into.ld; c += kLanes<T>)
      store(into.out + c, multiply_add(vec(from.out + c), splat(beta), vec(into.out + c) * alpha));
  }
}

template <class T>
void finish(const Attention& a, const RowTile& t, Memory memory) {
  const State<T> state(a, memory);
  const Sequence& s = a.sequences[t.sequence];
  const T v_scale = a.v_descale.get(t.sequence, t.head_k, 1);
  const T unit = Worth<T>(a, t.sequence, t.head_k).unit;
  const Worth<T> natural;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = (t.first + r) / a.group();
    const int64_t head = t.head_k * a.group() + (t.first + r) % a.group();
    T maximum = state.maximum[r] * unit, total = state.sum[r], scale = v_scale;
    const bool sees_nothing = maximum == -T(kInf) && total == T(0);
    if (a.sinks.data && !sees_nothing) {  // the sink is one more key, without a value
      const T sink = a.sinks.get(0, head, 0), base = greater(maximum, sink);
      const T alpha = natural.template exp<T>(maximum - base),
              weight = sink == base ? 1 : natural.template exp<T>(sink - base);
      total = total * alpha + weight;
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

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
