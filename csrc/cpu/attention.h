// One attention call as plain data: what the operators build after checking their arguments and
// what the kernels read. Nothing here owns memory or depends on an instruction set.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace fa3npu {

using torch::headeronly::ScalarType;

constexpr int64_t kChunk = 1024;  // keys per partial result; partial results merge in order
constexpr int64_t kMaxHeadDim = 512;

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Of 8 bits: what only a cache may hold beside a wider q, times a descale.
inline bool is_narrow(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2 ||
         dtype == ScalarType::Char;
}

// What may stand beside a narrow cache.
inline bool is_wide(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// A tensor of head vectors, each contiguous. Strides are in bytes.
struct Rows {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t batch = 0, row = 0, head = 0;
  int64_t element = 0;

  char* at(int64_t b, int64_t i, int64_t h) const { return data + b * batch + i * row + h * head; }
};

// A float32 tensor of one number per (batch or sequence, row, head): softmax_lse, descales, slopes.
struct Scalars {
  float* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;

  float& at(int64_t b, int64_t i, int64_t h) const { return data[b * batch + i * row + h * head]; }
  float get(int64_t b, int64_t h, float otherwise) const { return data ? at(b, 0, h) : otherwise; }
};

// Where the rows of one batch entry lie. Lengths and page ids have been checked against the
// tensors. Keys count from position 0 of the sequence, which would lie at k_begin; a cache that has
// dropped old keys has those from k_first to k_len.
struct Sequence {
  int64_t q_batch, q_begin, q_len;
  int64_t k_batch, k_begin, k_len;
  const int32_t* pages;  // null unless paged
  int64_t k_first = 0;
};

struct KeyRange {
  int64_t begin, end;
};

struct Attention {
  Rows q, k, v, qv, out;
  Rows dout, dq, dk, dv, delta;  // backward only; delta: a number per row, as the sums
  Scalars softmax_lse, dsoftmax_lse;
  Scalars q_descale, k_descale, v_descale;  // by sequence and KV head; empty: 1
  Scalars alibi_slopes;                     // (batch or 1, nheads)
  Scalars sinks;                            // (nheads,)
  const Sequence* sequences;
  int64_t batch_size, nheads, nheads_k, headdim, headdim_v;
  int64_t page_size = 0;
  int64_t row_tile = 64;  // rows of a tile in this call, which share what is loaded of K and V
  int64_t together = 1;   // KV heads whose tiles are computed together
  double softmax_scale, softcap;
  int64_t window_left, window_right, attention_chunk;  // -1, -1, 0: no limit

  int64_t group() const { return nheads / nheads_k; }
  int64_t rows(int64_t sequence) const { return sequences[sequence].q_len * group(); }
  bool is_double() const { return q.dtype == ScalarType::Double; }
  int64_t row_capacity() const { return round_up(row_tile, 32); }  // of a tile's buffers

  // The keys that query row i sees: every mask of FlashAttention is one interval per row, aligned
  // bottom-right, and both ends grow with i.
  KeyRange visible(const Sequence& s, int64_t i) const {
    const int64_t diagonal = i + s.k_len - s.q_len;
    int64_t begin = s.k_first, end = s.k_len;
    if (window_right >= 0) end = std::min(end, diagonal + window_right + 1);
    if (window_left >= 0) begin = std::max(begin, diagonal - window_left);
    if (attention_chunk > 0) {
      const int64_t offset = (diagonal % attention_chunk + attention_chunk) % attention_chunk;
      begin = std::max(begin, diagonal - offset);
      end = std::min(end, diagonal - offset + attention_chunk);
    }
    return {begin, std::max(begin, end)};
  }
};

}  // namespace fa3npu
