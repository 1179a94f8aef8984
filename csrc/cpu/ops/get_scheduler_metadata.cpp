// get_scheduler_metadata on CPU: int32, the partial results that each sequence's keys are cut into,
// 0 for the padding behind the batch. The CPU kernels plan by themselves in less time than they
// would take to read it, so it is a description; a schedule never changes a number.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/arguments.h"

namespace fa3npu {
namespace {

// The first `size` of at least as many lengths or offsets.
Lengths first_lengths(const MaybeTensor& t, int64_t size, const char* name) {
  if (!t) return {};
  FA3_CHECK(t->dim() == 1 && t->size(0) >= size, name, " must have at least ", size,
            " elements, got shape ", shape_of(*t));
  return Lengths(*t, t->size(0), name);
}

Tensor get_scheduler_metadata(int64_t batch_size, int64_t /*max_seqlen_q*/,
                              int64_t /*max_seqlen_k*/, int64_t /*num_heads_q*/,
                              int64_t /*num_heads_kv*/, int64_t /*headdim*/, Tensor cache_seqlens_,
                              ScalarType /*qkv_dtype*/, std::optional<int64_t> /*headdim_v*/,
                              MaybeTensor /*cu_seqlens_q*/, MaybeTensor cu_seqlens_k_new_,
                              MaybeTensor cache_leftpad_, std::optional<int64_t> /*page_size*/,
                              int64_t max_seqlen_k_new, bool /*causal*/,
                              std::vector<int64_t> /*window_size*/, int64_t /*attention_chunk*/,
                              bool /*has_softcap*/, int64_t /*num_splits*/,
                              std::optional<bool> /*pack_gqa*/, int64_t /*sm_margin*/,
                              double /*softcap*/, std::optional<double> /*softmax_scale*/) {
  const Lengths cache_seqlens = first_lengths(cache_seqlens_, batch_size, "cache_seqlens");
  const Lengths cu_seqlens = first_lengths(cu_seqlens_k_new_, batch_size + 1, "cu_seqlens_k_new");
  const Lengths leftpad = first_lengths(cache_leftpad_, batch_size, "cache_leftpad");
  Tensor metadata = torch::stable::new_zeros(cache_seqlens_, {cache_seqlens_.size(0)});
  int32_t* parts = metadata.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch_size; ++b) {
    const int64_t added = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : max_seqlen_k_new;
    const int64_t keys = cache_seqlens[b] + added - (leftpad ? leftpad[b] : 0);
    parts[b] = (std::max<int64_t>(keys, 0) + kChunk - 1) / kChunk;
  }
  return metadata;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("get_scheduler_metadata", TORCH_BOX(&get_scheduler_metadata));
}

}  // namespace fa3npu
