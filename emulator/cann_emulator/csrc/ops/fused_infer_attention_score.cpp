// aclnnFusedInferAttentionScore V3, V4 and V5: CANN's fused attention, in float32 on the host.
//
// Layouts TND, BSND, BNSD and BSH; paged or not; sparse_mode 0 to 4; query_rope and key_rope (MLA);
// learnable_sink; int8 keys and values with scales (antiquant) beside one row of a wider query.
#include <limits>

#include "attention_call.h"

namespace attention {

namespace {

// Rows of one sequence, as (tokens, heads, headdim), whatever the layout.
Tensor sequence(const Call &c, const Tensor &t, int64_t heads, int64_t b, int64_t end,
                int64_t length) {
  if (c.tnd()) return t.slice(0, end - length, end);
  Tensor rows = c.layout == "BNSD"  ? t[b].transpose(0, 1)
                : c.layout == "BSH" ? t[b].unflatten(-1, {heads, -1})
                                    : t[b];
  return rows.slice(0, 0, length);
}

Tensor pages(const Call &c, const Tensor &cache, int64_t b, int64_t length) {
  const int64_t count = (length + c.block_size - 1) / c.block_size;
  Tensor blocks = c.block_table[b].slice(0, 0, count).to(at::kLong);
  TORCH_CHECK(count == 0 || (blocks.min().item<int64_t>() >= 0 &&
                             blocks.max().item<int64_t>() < cache.size(0)),
              "aclnnFusedInferAttentionScore: block_table names a block outside the cache");
  Tensor rows = cache.index_select(0, blocks);
  rows = cache.dim() == 4 ? rows.transpose(1, 2) : rows.unflatten(-1, {c.num_kv_heads, -1});
  return rows.flatten(0, 1).slice(0, 0, length);
}

Tensor kv_sequence(const Call &c, const Tensor &t, int64_t b, int64_t length) {
  if (c.paged()) return pages(c, t, b, length);
  return sequence(c, t, c.num_kv_heads, b, c.tnd() ? (*c.kv_lengths)[b] : 0, length);
}

// The scales of one sequence's int8 keys or values, to be multiplied with (tokens, heads, headdim).
Tensor antiquant_scales(const Call &c, const Tensor &scale, int64_t b, int64_t length) {
  switch (c.key_antiquant_mode) {
    case kPerChannel:
      return scale.numel() == 1 ? scale : scale.reshape({c.num_kv_heads, -1});
    case kPerToken:
      return scale[0][b].slice(0, 0, length).reshape({length, 1, 1});
    case kPerHead:
      return scale.reshape({c.num_kv_heads, 1});
    default:  // kPerTokenAndHead
      return scale[b].slice(1, 0, length).t().unsqueeze(-1);
  }
}

// Keys or values of one sequence as (tokens, heads, headdim), in float32.
Tensor kv_numbers(const Call &c, const Tensor &t, const Tensor &scale, int64_t b, int64_t length) {
  Tensor rows = kv_sequence(c, t, b, length).to(at::kFloat);
  return scale.defined() ? rows * antiquant_scales(c, scale.to(at::kFloat), b, length) : rows;
}

// True where key j is hidden from query row i, (q, kv). The triangle is read from the caller's
// mask (1 hides), so that a mask of the other convention gives wrong numbers here too.
Tensor hidden(const Call &c, int64_t b, int64_t q, int64_t kv) {
  Tensor rows = at::arange(q).unsqueeze(1), columns = at::arange(kv).unsqueeze(0);
  Tensor none = at::zeros({q, kv}, at::kBool);
  if (!c.mask.defined() || (c.triangle() && c.decode())) return none;
  if (!c.triangle()) {
    Tensor mask = c.mask.reshape({-1, c.max_q(), c.mask.size(-1)}).to(at::kBool);
    Tensor full = mask[mask.size(0) == 1 ? 0 : b].slice(0, 0, q).slice(1, 0, kv);
    if (c.sparse_mode == kAllMask || c.decode()) return full;
    Tensor ahead = columns - rows;  // counted from the top left
    return full | (ahead > c.next_tokens) | (ahead < -c.pre_tokens);
  }
  Tensor middle = c.mask.reshape({kMaskSize, kMaskSize})[kMaskSize / 2].to(at::kBool);
  auto above = [&](const Tensor &ahead) {  // the mask's answer for a key `ahead` of its row
    int64_t limit = kMaskSize / 2 - 1;
    return middle.take(ahead.clamp(-limit, limit) + kMaskSize / 2);
  };
  Tensor ahead = columns - rows - (c.sparse_mode == kLeftUpCausal ? 0 : kv - q);
  if (c.sparse_mode != kBand) return above(ahead);
  // Both ends inclusive: i + kv - q - pre_tokens <= j <= i + kv - q + next_tokens. This is how the
  // documentation reads; no hardware has confirmed it.
  return above(ahead - c.next_tokens) | above(-ahead - c.pre_tokens);
}

void attend(const Call &c, int64_t b) {
  const int64_t q_length = c.q_length(b), kv_length = c.kv_length(b);
  const int64_t q_end = c.tnd() ? (*c.q_lengths)[b] : 0;
  const int64_t group = c.num_heads / c.num_kv_heads;
  auto heads_first = [](const Tensor &t) { return t.to(at::kFloat).transpose(0, 1); };
  auto grouped = [&](const Tensor &t, const Tensor &scale) {
    return heads_first(kv_numbers(c, t, scale, b, kv_length)).repeat_interleave(group, 0);
  };
  auto q_rows = [&](const Tensor &t) { return sequence(c, t, c.num_heads, b, q_end, q_length); };
  Tensor scores = heads_first(q_rows(c.query)).matmul(grouped(c.key, c.key_scale).transpose(1, 2));
  if (c.rope())
    scores += heads_first(q_rows(c.query_rope)).matmul(grouped(c.key_rope, {}).transpose(1, 2));
  const Tensor mask = hidden(c, b, q_length, kv_length);
  scores.mul_(c.scale).masked_fill_(mask, -std::numeric_limits<double>::infinity());
  Tensor lse = scores.logsumexp(-1, /*keepdim=*/true);  // -inf where a row sees nothing
  // Whether softmax_lse counts the sink is documented nowhere; here it does.
  if (c.sink.defined()) lse = at::logaddexp(lse, c.sink.to(at::kFloat).reshape({-1, 1, 1}));
  const Tensor blind = mask.all(-1).reshape({1, -1, 1}).expand_as(lse);
  Tensor weights = (scores - lse).exp_().masked_fill_(blind, 0.);
  q_rows(c.out).copy_(weights.matmul(grouped(c.value, c.value_scale)).transpose(0, 1));
  if (!c.want_lse) return;
  // +inf for a row that sees nothing is what FlashAttention's NPU kernels give. CANN documents
  // nothing, and no hardware has confirmed it.
  lse = lse.masked_fill(blind, std::numeric_limits<double>::infinity());
  if (c.tnd())
    c.lse.slice(0, q_end - q_length, q_end).copy_(lse.transpose(0, 1));
  else
    c.lse[b].slice(1, 0, q_length).copy_(lse);
}

int prepare_call(const Call &call, uint64_t *workspace, aclOpExecutor **executor) {
  return aclnn::prepare(workspace, executor, [&]() -> std::function<void()> {
    check_call(call);
    return [call] {
      for (int64_t b = 0; b < call.batch(); ++b) attend(call, b);
    };
  });
}

Tensor single(const aclTensorList *list) { return aclnn::value(list->tensors.at(0)); }

Lengths lengths(const aclIntArray *array) { return array ? Lengths(array->values) : std::nullopt; }

}  // namespace

}  // namespace attention

// The versions differ by a few inputs in two places. V1 and V2 are what older CANN has.
#define FIA_INPUTS                                                                                 \
  const aclTensor *query, const aclTensorList *key, const aclTensorList *value,                    \
      const aclTensor *pse_shift, const aclTensor *atten_mask, const aclIntArray *q_lengths,       \
      const aclIntArray *kv_lengths, const aclTensor *dequant1, const aclTensor *quant1,           \
      const aclTensor *dequant2, const aclTensor *quant2, const aclTensor *quant_offset2,          \
      const aclTensor *antiquant, const aclTensor *antiquant_offset, const aclTensor *block_table, \
      const aclTensor *query_padding, const aclTensor *kv_padding, const aclTensor *key_scale,     \
      const aclTensor *key_offset, const aclTensor *value_scale, const aclTensor *value_offset,    \
      const aclTensor *key_prefix, const aclTensor *value_prefix, const void *prefix_length,       \
      const aclTensor *query_rope, const aclTensor *key_rope, const aclTensor *key_rope_scale
#define FIA_OPTIONS                                                                             \
  int64_t num_heads, double scale, int64_t pre_tokens, int64_t next_tokens, const char *layout, \
      int64_t num_kv_heads, int64_t sparse_mode, int64_t inner_precise, int64_t block_size,     \
      int64_t /*antiquant_mode*/, bool want_lse, int64_t key_mode, int64_t value_mode
#define FIA_RESULTS \
  const aclTensor *out, const aclTensor *lse, uint64_t *workspace, aclOpExecutor **executor
#define FIA_PREPARE(SINK, EXTRA)                                                                 \
  attention::prepare_call(                                                                       \
      attention::Call{aclnn::value(query),                                                       \
                      attention::single(key),                                                    \
                      attention::single(value),                                                  \
                      aclnn::value(atten_mask),                                                  \
                      aclnn::value(block_table),                                                 \
                      aclnn::value(query_rope),                                                  \
                      aclnn::value(key_rope),                                                    \
                      aclnn::value(static_cast<const aclTensor *>(SINK)),                        \
                      aclnn::value(key_scale),                                                   \
                      aclnn::value(value_scale),                                                 \
                      aclnn::value(out),                                                         \
                      aclnn::value(lse),                                                         \
                      attention::lengths(q_lengths),                                             \
                      attention::lengths(kv_lengths),                                            \
                      num_heads,                                                                 \
                      num_kv_heads ? num_kv_heads : num_heads,                                   \
                      pre_tokens,                                                                \
                      next_tokens,                                                               \
                      sparse_mode,                                                               \
                      inner_precise,                                                             \
                      block_size,                                                                \
                      key_mode,                                                                  \
                      value_mode,                                                                \
                      scale,                                                                     \
                      want_lse,                                                                  \
                      layout,                                                                    \
                      pse_shift || dequant1 || quant1 || dequant2 || quant2 || quant_offset2 ||  \
                          antiquant || antiquant_offset || query_padding || kv_padding ||        \
                          key_offset || value_offset || key_prefix || value_prefix ||            \
                          prefix_length || key_rope_scale || key->tensors.size() != 1 || EXTRA}, \
      workspace, executor)

// GetMaxWorkspaceSize is what torch_npu asks before a capture: no call needs any workspace.
#define FIA_VERSION(NAME, MORE_INPUTS, MORE_OPTIONS, SINK, EXTRA)                            \
  extern "C" int NAME##GetWorkspaceSize(FIA_INPUTS MORE_INPUTS, FIA_OPTIONS MORE_OPTIONS,    \
                                        FIA_RESULTS) {                                       \
    return FIA_PREPARE(SINK, EXTRA);                                                         \
  }                                                                                          \
  extern "C" int NAME##GetMaxWorkspaceSize(FIA_INPUTS MORE_INPUTS, FIA_OPTIONS MORE_OPTIONS, \
                                           FIA_RESULTS) {                                    \
    return FIA_PREPARE(SINK, EXTRA);                                                         \
  }                                                                                          \
  ACLNN_LAUNCH(NAME)
#define MORE(...) , __VA_ARGS__

FIA_VERSION(aclnnFusedInferAttentionScoreV3, , , nullptr, false)
FIA_VERSION(aclnnFusedInferAttentionScoreV4,
            MORE(const aclTensor *query_scale, const aclTensor *sink), MORE(int64_t /*query_mode*/),
            sink, query_scale)
FIA_VERSION(aclnnFusedInferAttentionScoreV5,
            MORE(const aclTensor *query_scale, const aclTensor *sink, const aclTensor *q_start,
                 const aclTensor *kv_start),
            MORE(int64_t /*query_mode*/, int64_t /*pse_type*/), sink,
            query_scale || q_start || kv_start)
