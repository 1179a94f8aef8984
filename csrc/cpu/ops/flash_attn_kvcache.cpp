// flash_attn_kvcache and its .out overload on CPU: attention over a dense or paged cache.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/arguments.h"

namespace fa3npu {
namespace {

std::tuple<Tensor, Tensor> flash_attn_kvcache(
    MaybeTensor out, Tensor q, Tensor k_cache, Tensor v_cache, MaybeTensor qv,
    MaybeTensor cache_seqlens, MaybeTensor cache_batch_idx, MaybeTensor cache_leftpad,
    MaybeTensor page_table, MaybeTensor cu_seqlens_q, std::optional<int64_t> /*max_seqlen_q*/,
    MaybeTensor seqused_q, MaybeTensor q_descale, MaybeTensor k_descale, MaybeTensor v_descale,
    std::optional<double> softmax_scale, bool causal, std::vector<int64_t> window_size,
    int64_t attention_chunk, double softcap, MaybeTensor /*scheduler_metadata*/,
    int64_t /*num_splits*/, std::optional<bool> /*pack_gqa*/, int64_t /*sm_margin*/,
    MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor cache_start) {
  AttentionArguments args{q, k_cache, v_cache};
  args.qv = qv;
  args.cu_seqlens_q = cu_seqlens_q;
  args.seqused_q = seqused_q;
  args.seqused_k = cache_seqlens;
  args.seqused_k_name = "cache_seqlens";
  args.page_table = page_table;
  args.cache_batch_idx = cache_batch_idx;
  args.cache_leftpad = cache_leftpad;
  args.cache_start = cache_start;
  args.q_descale = q_descale;
  args.k_descale = k_descale;
  args.v_descale = v_descale;
  args.alibi_slopes = alibi_slopes;
  args.sinks = sinks;
  args.softmax_scale = softmax_scale;
  args.causal = causal;
  args.window_size = window_size;
  args.attention_chunk = attention_chunk;
  args.softcap = softcap;
  return AttentionCall(args).forward(out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("flash_attn_kvcache", TORCH_BOX(&Overloads<flash_attn_kvcache>::fresh));
  m.impl("flash_attn_kvcache.out", TORCH_BOX(&Overloads<flash_attn_kvcache>::into));
}

}  // namespace fa3npu
