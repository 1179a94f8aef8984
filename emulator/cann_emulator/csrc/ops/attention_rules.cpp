// The documented limits of CANN's fused attention (npu_fused_infer_attention_score).
#include <algorithm>

#include "attention_call.h"

namespace attention {

namespace {

bool one_of(int64_t x, std::initializer_list<int64_t> values) {
  return std::find(values.begin(), values.end(), x) != values.end();
}

bool cumulative(const std::vector<int64_t>& ends) {
  return !ends.empty() && ends.front() >= 0 && std::is_sorted(ends.begin(), ends.end());
}

bool is_contiguous(const Tensor& t) { return !t.defined() || t.is_contiguous(); }

void check(std::initializer_list<aclnn::Rule> rules) {
  aclnn::require("aclnnFusedInferAttentionScore", rules);
}

// One row of query over int8 keys and values, which the documentation of Q_S 1 allows: per channel
// (or one number), per token, per head, and per token and head.
void check_antiquant(const Call& c) {
  check({
      {c.key_scale.defined() && c.value_scale.defined(),
       "int8 keys and values need key_antiquant_scale and value_antiquant_scale"},
      {c.decode(), "int8 keys and values are emulated for Q_S 1, in BSND, BNSD and BSH"},
      {c.headdim() % 32 == 0, "the head dim must be a multiple of 32 with int8 keys and values"},
      {!c.paged() || c.block_size % 32 == 0,
       "block_size must be a multiple of 32 with int8 keys and values"},
      {c.key_antiquant_mode == c.value_antiquant_mode,
       "key_antiquant_mode and value_antiquant_mode must be equal"},
      {c.key_antiquant_mode >= kPerChannel && c.key_antiquant_mode <= kPerTokenAndHead,
       "the emulated antiquant modes are 0 to 3"},
  });
  const int64_t mode = c.key_antiquant_mode, n = c.num_kv_heads, d = c.headdim();
  const bool per_token = mode == kPerToken || mode == kPerTokenAndHead;
  auto shape_fits = [&](at::IntArrayRef shape) {
    if (mode == kPerChannel)
      return shape == at::IntArrayRef{1} || shape == at::IntArrayRef{1, n, 1, d} ||
             shape == at::IntArrayRef{1, n, d} || shape == at::IntArrayRef{1, n * d};
    if (mode == kPerHead) return shape == at::IntArrayRef{n};
    const int64_t b = c.batch();
    return shape.size() == 3 && shape[0] == (mode == kPerToken ? 1 : b) &&
           shape[1] == (mode == kPerToken ? b : n) && shape[2] >= c.kv_room();
  };
  const auto dtype = per_token ? at::kFloat : c.query.scalar_type();
  check({
      {c.key_scale.scalar_type() == dtype && c.value_scale.scalar_type() == dtype,
       "antiquant scales must be float32 per token, else of the dtype of query"},
      {c.key_scale.sizes() == c.value_scale.sizes() && shape_fits(c.key_scale.sizes()),
       "antiquant scales must be (1,), (1, N, 1, D), (1, N, D) or (1, H) in mode 0, (1, B, S) in "
       "mode 1, (N,) in mode 2, (B, N, S) in mode 3, with S for all that block_table addresses"},
      {is_contiguous(c.key_scale) && is_contiguous(c.value_scale),
       "non-contiguous tensors are not supported"},
  });
}

}  // namespace

// In steps, because a later step relies on what an earlier one found.
void check_call(const Call& c) {
  const auto dtype = c.query.scalar_type();
  check({
      {!c.unsupported_input,
       "pse_shift, quantisation but for key_antiquant_scale and value_antiquant_scale, padding, "
       "shared prefixes and lists of several key tensors are not emulated"},
      {c.layout == "TND" || c.layout == "BSND" || c.layout == "BNSD" || c.layout == "BSH",
       "the emulated layouts are TND, BSND, BNSD and BSH"},
      {dtype == at::kHalf || dtype == at::kBFloat16, "query must be float16 or bfloat16"},
      {c.value.scalar_type() == c.key.scalar_type() &&
           (c.antiquant() || c.key.scalar_type() == dtype),
       "query, key and value must have one dtype, or key and value int8"},
      {c.antiquant() || !(c.key_scale.defined() || c.value_scale.defined()),
       "antiquant scales need int8 keys and values"},
      {is_contiguous(c.query) && is_contiguous(c.key) && is_contiguous(c.value) &&
           is_contiguous(c.query_rope) && is_contiguous(c.key_rope) && is_contiguous(c.mask) &&
           is_contiguous(c.block_table),
       "non-contiguous tensors are not supported"},
      {c.num_heads >= 1 && c.num_heads <= 256, "num_heads must be 1 to 256"},
      {c.num_kv_heads >= 1 && c.num_heads % c.num_kv_heads == 0,
       "num_key_value_heads must divide num_heads"},
      {c.num_heads / std::max<int64_t>(c.num_kv_heads, 1) <= 64,
       "num_heads / num_key_value_heads must be at most 64"},
      {c.query_rope.defined() == c.key_rope.defined(), "query_rope and key_rope come together"},
      {c.sparse_mode >= kDefault && c.sparse_mode <= kBand, "sparse_mode must be 0 to 4"},
      {c.inner_precise >= 0 && c.inner_precise <= 3, "inner_precise must be 0 to 3"},
      {!c.tnd() || (c.q_lengths && c.kv_lengths),
       "TND needs actual_seq_lengths and actual_seq_lengths_kv"},
      {!c.paged() || c.kv_lengths, "a block_table needs actual_seq_lengths_kv"},
  });
  const int64_t batch = c.batch(), d = c.headdim(), dv = c.headdim_v();
  auto lengths_fit = [&](const Lengths& lengths) {
    int64_t n = lengths ? lengths->size() : 1;
    return n == 1 || n >= batch;
  };
  check({
      {d % 16 == 0 && dv % 16 == 0, "the head dim must be a multiple of 16"},
      {d <= 512 && dv <= 512, "the head dim must be at most 512"},
      {c.per_head(c.key) == d, "query and key must have one head dim"},
      {c.heads(c.query, c.num_heads) == c.num_heads, "num_heads must be that of query"},
      {c.paged() || c.heads(c.key, c.num_kv_heads) == c.num_kv_heads,
       "num_key_value_heads must be that of key"},
      {c.key.sizes().slice(0, c.key.dim() - 1) == c.value.sizes().slice(0, c.value.dim() - 1),
       "key and value must agree in all but the head dim"},
      {c.paged() || c.tnd() || c.key.size(0) == batch, "query and key must have one batch size"},
      {c.tnd() ? cumulative(*c.q_lengths) : lengths_fit(c.q_lengths),
       "actual_seq_lengths must be the cumulative ends (TND), or one length, or one per sequence"},
      {!c.tnd() || c.q_lengths->back() == c.query.size(0),
       "the last of actual_seq_lengths must be the number of query tokens (TND)"},
      {!c.tnd() || batch <= 4096, "TND takes at most 4096 sequences"},
      {c.tnd() ? static_cast<int64_t>(c.kv_lengths->size()) == batch : lengths_fit(c.kv_lengths),
       "actual_seq_lengths_kv must have one entry per sequence"},
      {!c.tnd() || c.paged() || cumulative(*c.kv_lengths),
       "actual_seq_lengths_kv must be the cumulative ends (TND without pages)"},
      {!c.tnd() || c.rope() || (d == 128 && dv == 128) || (d == 192 && one_of(dv, {128, 192})),
       "TND without rope takes head dim 128, or 192 with a value head dim of 128 or 192"},
      {c.max_q() > 1 || c.inner_precise <= 1, "inner_precise must be 0 or 1 when Q_S is 1"},
  });
  if (c.rope()) {
    check({
        {d == 512 || d == 128, "rope takes head dim 512 or 128"},
        {c.query_rope.scalar_type() == dtype && c.key_rope.scalar_type() == dtype,
         "query_rope and key_rope must have the dtype of query"},
        {c.query_rope.numel() * d == c.query.numel() * 64 &&
             c.key_rope.numel() * d == c.key.numel() * 64,
         "query_rope and key_rope must have head dim 64, else the shapes of query and key"},
        {d != 128 || dv == 128, "rope with head dim 128 takes a value head dim of 128"},
        {d != 512 || one_of(c.num_heads, {1, 2, 4, 8, 16, 32, 64, 128}),
         "rope with head dim 512 takes a power of two of heads, at most 128"},
        {d != 512 || c.num_kv_heads == 1, "rope with head dim 512 takes one key head"},
        {d != 512 || one_of(c.sparse_mode, {0, 3, 4}),
         "rope with head dim 512 takes sparse_mode 0, 3 or 4"},
        {d != 512 || !c.want_lse, "rope with head dim 512 gives no softmax_lse"},
    });
  }
  if (c.paged()) {
    const int64_t size = c.block_size;
    const Tensor& key = c.key;
    const bool by_head = key.dim() == 4;
    check({
        {c.block_table.scalar_type() == at::kInt, "block_table must be int32"},
        {c.block_table.dim() == 2 && c.block_table.size(0) == batch,
         "block_table must be (batch, max blocks)"},
        {size > 0 && size % 16 == 0, "block_size must be a positive multiple of 16"},
        {c.tnd() || c.rope() ? size <= 1024 : size <= 512,
         "block_size must be at most 512; 1024 for TND or rope"},
        {c.tnd() || c.rope() || c.max_q() == 1 || size % 128 == 0,
         "block_size must be a multiple of 128 when Q_S > 1"},
        {key.dim() == 3 ? key.size(1) == size
                        : by_head && key.size(1) == c.num_kv_heads && key.size(2) == size,
         "a paged key must be (blocks, block_size, heads * headdim) or "
         "(blocks, heads, block_size, headdim)"},
        {!by_head || c.layout == "BNSD" || c.tnd(),
         "BSH and BSND take a paged key of (blocks, block_size, heads * headdim)"},
    });
  }
  for (int64_t b = 0; b < batch; ++b) {
    check({{c.q_length(b) >= 0 && c.q_length(b) <= c.max_q(),
            "a length of actual_seq_lengths is outside query"},
           {c.kv_length(b) >= 0 && c.kv_length(b) <= c.kv_room(),
            "a length of actual_seq_lengths_kv is outside key, or block_table"}});
  }
  if (c.antiquant()) check_antiquant(c);
  if (c.sink.defined())
    check({{c.tnd() && dv <= 128, "learnable_sink takes TND and a value head dim of at most 128"},
           {c.sink.scalar_type() == at::kBFloat16 && c.sink.numel() == c.num_heads,
            "learnable_sink must be bfloat16 of (num_heads,)"}});
  if (c.triangle() || c.sparse_mode == kAllMask)
    check({{c.mask.defined(), "sparse_mode 1, 2, 3 and 4 need an atten_mask"}});
  if (!c.mask.defined()) return;
  check({{one_of(static_cast<int64_t>(c.mask.scalar_type()),
                 {static_cast<int64_t>(at::kBool), static_cast<int64_t>(at::kChar),
                  static_cast<int64_t>(at::kByte)}),
          "atten_mask must be bool, int8 or uint8"}});
  if (c.triangle())
    check({{c.mask.dim() >= 2 && c.mask.size(-1) == kMaskSize && c.mask.size(-2) == kMaskSize &&
                c.mask.numel() == kMaskSize * kMaskSize,
            "sparse_mode 2, 3 and 4 need an atten_mask of (2048, 2048)"}});
  else
    check({{!c.tnd(), "a full atten_mask is emulated for BSND, BNSD and BSH only"},
           {c.mask.numel() == c.mask.size(-1) * c.max_q() ||
                c.mask.numel() == c.mask.size(-1) * c.max_q() * batch,
            "atten_mask must be (Q_S, KV_S), (1, Q_S, KV_S) or (B, 1, Q_S, KV_S)"}});
}

}  // namespace attention
