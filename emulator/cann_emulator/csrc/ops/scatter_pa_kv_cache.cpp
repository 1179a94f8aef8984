// aclnnScatterPaKvCache with cache_mode "Norm": writes key and value tokens to slots of a paged
// cache (num_blocks, block_size, nheads, headdim), and skips negative slots, as op-plugin's own
// test of it expects. What CANN documents as unsupported is refused.
#include <cstring>

#include "aclnn.h"

namespace {

using aclnn::value;
using at::Tensor;

bool fits(const Tensor& tokens, const Tensor& cache) {
  return tokens.dim() == 3 && cache.dim() == 4 && tokens.size(1) == cache.size(2) &&
         tokens.size(2) == cache.size(3);
}

void write(const Tensor& tokens, const Tensor& cache, const Tensor& slots) {
  Tensor rows = cache.flatten(0, 1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  // Last to first: for a slot that occurs twice CANN promises nothing, so neither must a caller
  // that expects the last write to win get it.
  for (int64_t i = slots.numel() - 1; i >= 0; --i) {
    if (slot[i] < 0) continue;
    TORCH_CHECK(slot[i] < rows.size(0), "aclnnScatterPaKvCache: slot ", slot[i], " of token ", i,
                " is outside [0, ", rows.size(0), ")");
    rows[slot[i]].copy_(tokens[i]);
  }
}

}  // namespace

extern "C" int aclnnScatterPaKvCacheGetWorkspaceSize(
    const aclTensor* key_, const aclTensor* key_cache_, const aclTensor* slot_mapping_,
    const aclTensor* value_, const aclTensor* value_cache_, const aclTensor* compress_lens,
    const aclTensor* compress_seq_offsets, const aclTensor* seq_lens, const char* cache_mode,
    const char*, const aclIntArray*, const aclIntArray*, uint64_t* workspace,
    aclOpExecutor** executor) {
  return aclnn::prepare(workspace, executor, [&] {
    Tensor key = value(key_), values = value(value_), slots = value(slot_mapping_);
    Tensor key_cache = value(key_cache_), value_cache = value(value_cache_);
    auto same_dtype = [&](const Tensor& t) { return t.scalar_type() == key.scalar_type(); };
    aclnn::require(
        "aclnnScatterPaKvCache",
        {
            {!cache_mode || !strcmp(cache_mode, "Norm"), "only cache_mode Norm is emulated"},
            {!compress_lens && !compress_seq_offsets && !seq_lens, "compression is not emulated"},
            {same_dtype(values) && same_dtype(key_cache) && same_dtype(value_cache),
             "key, value, key_cache and value_cache must have one dtype"},
            {key.is_contiguous() && values.is_contiguous() && slots.is_contiguous(),
             "key, value and slot_mapping must be contiguous"},
            {key_cache.is_contiguous() && value_cache.is_contiguous(),
             "the caches must be contiguous"},
            {fits(key, key_cache) && fits(values, value_cache),
             "key and value must be (tokens, nheads, headdim), the caches "
             "(num_blocks, block_size, nheads, headdim)"},
            {key.sizes().slice(0, 2) == values.sizes().slice(0, 2),
             "key and value must agree in tokens and heads"},
            {key_cache.sizes().slice(0, 2) == value_cache.sizes().slice(0, 2),
             "the caches must agree in blocks and block size"},
            {slots.scalar_type() == at::kInt || slots.scalar_type() == at::kLong,
             "slot_mapping must be int32 or int64"},
            {slots.dim() == 1 && slots.numel() == key.size(0), "slot_mapping must be (tokens,)"},
        });
    return [=] {
      Tensor slots64 = slots.to(at::kLong);
      write(key, key_cache, slots64);
      write(values, value_cache, slots64);
    };
  });
}

ACLNN_LAUNCH(aclnnScatterPaKvCache)
