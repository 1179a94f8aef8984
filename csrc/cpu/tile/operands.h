// What products multiply, in scratch memory: blocks of keys and values, tiles of query rows.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/tile/arena.h"
#include "cpu/tile/kernels.h"
#include "cpu/tile/product.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

// Keys a step of the online softmax, at absolute multiples of it; a divisor of kChunk.
constexpr int64_t kKeyBlock = FA3NPU_AMX ? 128 : 64;
constexpr int64_t kPanelBlocks = 256 / kKeyBlock;  // that many rows take one after another

// Query rows whose scores are computed, turned into P and multiplied by V while they are in cache.
template <class U>
constexpr int64_t kRowGroup = FA3NPU_AMX ? 32 : 48 * kDepth<U>;

template <class U>
constexpr int64_t padded(int64_t width) {  // to whole vectors
  return round_up(width, Raw<U>::kElements);
}

// Where the keys of a block lie, for KV head 0.
struct KeyRows {
  const char* at[kKeyBlock];
  int64_t count;
  bool even;  // whether a row's distance to the next is the cache's own in every 16 keys

  KeyRows() = default;
  KeyRows(const Attention& a, const Rows& cache, const Sequence& s, int64_t first, int64_t count)
      : count(count) {
    const int64_t missing = clamp(s.k_first - first, 0, count);  // the first key stands for them
    int64_t position = s.k_begin + (first < s.k_first ? s.k_first : first);
    even = missing == 0 && (s.pages == nullptr || (a.page_size % 16 == 0 && position % 16 == 0));
    if (s.pages == nullptr) {
      for (int64_t j = 0; j < missing; ++j) at[j] = cache.at(s.k_batch, position, 0);
      for (int64_t j = missing; j < count; ++j)
        at[j] = cache.at(s.k_batch, position + j - missing, 0);
      return;
    }
    int64_t page = position / a.page_size;
    position -= page * a.page_size;
    for (int64_t j = 0; j < missing; ++j) at[j] = cache.at(s.pages[page], position, 0);
    for (int64_t j = missing; j < count; ++j, ++position) {
      if (position == a.page_size) position = 0, ++page;
      at[j] = cache.at(s.pages[page], position, 0);
    }
  }
};

// Asks for a row that no hardware does, since the one before lies on another page.
INLINE void prefetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

constexpr char kZeros[kMaxHeadDim * 8] = {};

// A block of K or V as the right side of products, of either kind or both:
//   rows        summed over keys: [key][ld], of Pairs [key / 2][ld], each of two keys
//   transposed  summed over columns: [column or pair of columns][kKeyBlock]
// Keys past the block's count, up to a whole step of 32, and columns past the width are zero.
template <class U>
struct KeyTile {
  U *rows, *transposed, *strip;
  U* spare;  // as large as rows, for add_product
  int64_t width, ld;

  KeyTile(int64_t width, bool with_rows, bool with_transposed, Arena& arena)
      : width(width), ld(padded<U>(width)) {
    const int64_t size = kKeyBlock / kDepth<U> * ld;
    rows = with_rows ? arena.take<U>(size) : nullptr;
    spare = with_rows ? arena.take<U>(size) : nullptr;
    transposed = with_transposed ? arena.take<U>(size) : nullptr;
    strip = arena.take<U>(kLanes<U> * ld / kDepth<U>);
  }

  void load(const KeyRows& keys, const Rows& cache, int64_t head) {
    const bool direct = width == ld && with_reader<U>(cache.dtype, [&](auto reader) {
                          load_as<decltype(reader)>(keys, cache, head);
                        });
    if (!direct) load_as<void>(keys, cache, head);
  }

  bool finite(int64_t keys) const { return all_finite(rows, round_up(keys, 32) / kDepth<U> * ld); }

 private:
  template <class From>  // or void: by way of the strip
  void load_as(const KeyRows& keys, const Rows& cache, int64_t head) {
    const int64_t end = round_up(keys.count, 32);
    const auto ask = [&](int64_t j) {
      for (int64_t i = j; i < least(j + kLanes<U>, keys.count); ++i)
        prefetch(keys.at[i] + head * cache.head, width * cache.element);
    };
    ask(0);
    for (int64_t j = 0; j < end; j += kLanes<U>) {
      ask(j + kLanes<U>);
      const char* from[kLanes<U>];
      for (int64_t i = 0; i < kLanes<U>; ++i)
        from[i] = j + i < keys.count ? keys.at[j + i] + head * cache.head : kZeros;
      if constexpr (std::is_void_v<From>) {
        for (int64_t i = 0; i < kLanes<U>; ++i) {
          U* row = strip + i * (ld / kDepth<U>);
          fill<U>(row, ld / kDepth<U>, U{});
          if (j + i < keys.count) load_row<U>(from[i], cache.dtype, width, row);
          from[i] = reinterpret_cast<const char*>(row);
        }
        arrange<Raw<U>>(from, j);
      } else {
        arrange<From>(from, j);
      }
    }
  }

  template <class From>
  INLINE void arrange(const char* const* from, int64_t j) {
    for (int64_t i = 0; rows && i < kLanes<U>; i += kDepth<U>) {
      const char *x = from[i], *y = from[i + kDepth<U> - 1];
      U* to = rows + (j + i) / kDepth<U> * ld;
      for (int64_t c = 0; c < ld; c += From::kElements) {
        if constexpr (kDepth<U> == 2)
          interleave(From::vector(x + c * From::kBytes), From::vector(y + c * From::kBytes),
                     to + c);
        else
          store(to + c, From::vector(x + c * From::kBytes));
      }
    }
    for (int64_t c = 0; transposed && c < ld; c += From::kElements)
      transpose<U>([&](int64_t i) { return From::vector(from[i] + c * From::kBytes); },
                   transposed + c / kDepth<U> * kKeyBlock + j, kKeyBlock);
  }
};

// Whether a tile takes the loop of few rows.
inline bool few_rows(const Attention& a, int64_t rows) {
  return rows <= kFewRows && a.qv.data == nullptr;
}

template <class T>
struct Iota {
  T at[kLanes<T>];
};
template <class T>
constexpr Iota<T> kIota = [] {
  Iota<T> iota{};
  for (int64_t i = 0; i < kLanes<T>; ++i) iota.at[i] = T(i);
  return iota;
}();

// What scores are worth. They are scaled when they become logits, unless nothing else happens to
// them: then a logit is a score, and what it is worth comes with the exponential.
template <class T>
struct Worth {
  T scale = 1, unit = 1;  // a score's as a logit, a logit's
  bool scaled = true;

  Worth() = default;
  Worth(const Attention& a, int64_t sequence, int64_t head_k) {
    // With a qv, whose product has another factor, K's is not that of all scores.
    const T k_scale = a.qv.data ? 1 : a.k_descale.get(sequence, head_k, 1);
    scale = quiet(T(a.softmax_scale * a.q_descale.get(sequence, head_k, 1) * k_scale));
    const bool usual = scale > T(1e-30) && scale < T(1e30);  // and above 0, which keeps the order
    if (!usual || a.softcap > 0 || a.alibi_slopes.data) return;
    unit = scale;
    scale = 1;
    scaled = false;
  }

  // e to the power of a difference of logits, to be multiplied as U.
  template <class U, class V>
  INLINE V exp(const V& difference) const {
    return exp2_<U>(V(difference * (unit * T(1.44269504088896340736))));
  }
};

// A tile of query rows: their q (and qv) as the left side of products, and what the softmax needs:
// who they are and which keys they see.
template <class U>
struct QueryTile {
  typedef Sum<U> T;
  const Attention& a;
  int64_t ld, ld_v;
  U *q, *qv;  // [row][ld], [row][ld_v], zero past headdim and headdim_v
  int64_t* position;
  KeyRange* keys;
  T* slope;
  Worth<T> worth;
  const Sequence* s = nullptr;
  int64_t head_k = 0, first = 0, rows = 0;

  QueryTile(const Attention& a, Arena& arena)
      : a(a), ld(padded<U>(a.headdim) / kDepth<U>), ld_v(padded<U>(a.headdim_v) / kDepth<U>) {
    q = arena.take<U>(a.row_capacity() * ld);
    qv = a.qv.data ? arena.take<U>(a.row_capacity() * ld_v) : nullptr;
    position = arena.take<int64_t>(a.row_tile);
    keys = arena.take<KeyRange>(a.row_tile);
    slope = arena.take<T>(a.row_tile);
  }

  int64_t head(int64_t r) const { return head_k * a.group() + (first + r) % a.group(); }

  void load(const RowTile& tile) {
    const int64_t sequence = tile.sequence;
    s = a.sequences + sequence;
    head_k = tile.head_k;
    first = tile.first;
    rows = tile.rows;
    const T k_scale = a.k_descale.get(sequence, head_k, 1);
    const T v_scale = a.v_descale.get(sequence, head_k, 1);
    worth = Worth<T>(a, sequence, head_k);
    int64_t i = first / a.group(), in_group = first % a.group();
    const int64_t last = i + (in_group + rows - 1) / a.group(), bytes = a.headdim * a.q.element;
    constexpr int64_t kAhead = 8;  // tokens
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = head_k * a.group() + in_group;
      if (i + kAhead <= last) prefetch(a.q.at(s->q_batch, s->q_begin + i + kAhead, h), bytes);
      position[r] = i;
      keys[r] = a.visible(*s, i);
      slope[r] = quiet(a.alibi_slopes.get(sequence, h, 0));
      load_q(a.q, i, h, a.headdim, ld, qv ? k_scale : 1, q + r * ld);
      if (qv) load_q(a.qv, i, h, a.headdim_v, ld_v, v_scale, qv + r * ld_v);
      if (++in_group == a.group()) in_group = 0, ++i;
    }
  }

  void load_q(const Rows& from, int64_t i, int64_t h, int64_t width, int64_t row_ld, T scale,
              U* row) const {
    fill<U>(row + width / kDepth<U>, row_ld - width / kDepth<U>, U{});
    load_row(from.at(s->q_batch, s->q_begin + i, h), from.dtype, width, row);
    if constexpr (kDepth<U> == 1)
      for (int64_t c = 0; scale != 1 && c < width; ++c) row[c] *= scale;
  }

  // to[row - begin][kKeyBlock] = q k^T + qv v^T of `count` rows and the first `columns` keys of a
  // block, not yet scaled
  template <class F = Nothing>
  void scores(int64_t begin, int64_t count, int64_t columns, const KeyTile<U>& k,
              const KeyTile<U>& v, T* to, F&& between = F()) const {
    product<U>(count, columns, units<U>(a.headdim), {q + begin * ld, ld, 1}, k.transposed,
               kKeyBlock, to, kKeyBlock, false, between);
    if (qv)
      product<U>(count, columns, units<U>(a.headdim_v), {qv + begin * ld_v, ld_v, 1}, v.transposed,
                 kKeyBlock, to, kKeyBlock, true, between);
  }

  // One vector of row r's scores at keys block + lane... as logits: scaled, capped, biased. Masked
  // keys are -inf. `capped` is the score before the bias, which the softcap's gradient needs.
  INLINE Vec<T> logits(int64_t r, int64_t block, int64_t lane, const Vec<T>& score,
                       Vec<T>* capped = nullptr) const {
    const Vec<T> index = vec(kIota<T>.at) + T(lane);
    Vec<T> x = score * worth.scale;
    if (a.softcap > 0) x = softcapped(x, T(a.softcap));
    if (capped) *capped = x;
    if (slope[r] != 0) {
      const Vec<T> distance = T(position[r] + s->k_len - s->q_len - block) - index;
      x = multiply_add(distance < T(0) ? distance : -distance, splat(slope[r]), x);
    }
    const T begin = T(clamp(keys[r].begin - block, 0, kKeyBlock));
    const T end = T(clamp(keys[r].end - block, 0, kKeyBlock));
    return ((index >= begin) & (index < end)) ? x : Vec<T>{} - T(kInf);
  }

  bool sees_all(int64_t r, int64_t block) const {
    return keys[r].begin <= block && keys[r].end >= block + kKeyBlock;
  }

  // How many keys of the block the rows that see most of it see, rounded up to whole steps.
  int64_t columns_of(int64_t block, int64_t begin, int64_t count, int64_t step = 32) const {
    return least(round_up(keys[begin + count - 1].end - block, step), kKeyBlock);
  }

  // Of `count` rows from `begin`: whether any sees a key of the block, whether all see all of it.
  bool any_sees(int64_t block, int64_t begin, int64_t count) const {
    return keys[begin].begin < block + kKeyBlock && keys[begin + count - 1].end > block;
  }
  bool all_see(int64_t block, int64_t begin, int64_t count) const {
    const int64_t end = least(block + kKeyBlock, s->k_len);
    return keys[begin + count - 1].begin <= block && keys[begin].end >= end;
  }
  bool sees(int64_t r, int64_t key) const { return keys[r].begin <= key && key < keys[r].end; }
};

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
