// flash_attn_varlen_func, its .out overload and its backward on CPU: packed (total, nheads,
// headdim).

#include <torch/csrc/stable/library.h>

#include "cpu/ops/arguments.h"

namespace fa3npu {
namespace {

std::tuple<Tensor, Tensor> flash_attn_varlen_func(
    MaybeTensor out, Tensor q, Tensor k, Tensor v, MaybeTensor cu_seqlens_q,
    MaybeTensor cu_seqlens_k, std::optional<int64_t> /*max_seqlen_q*/,
    std::optional<int64_t> /*max_seqlen_k*/, MaybeTensor seqused_q, MaybeTensor seqused_k,
    std::optional<double> softmax_scale, bool causal, MaybeTensor qv, MaybeTensor q_descale,
    MaybeTensor k_descale, MaybeTensor v_descale, std::vector<int64_t> window_size,
    int64_t attention_chunk, double softcap, int64_t /*num_splits*/,
    std::optional<bool> /*pack_gqa*/, bool /*deterministic*/, int64_t /*sm_margin*/,
    MaybeTensor alibi_slopes, MaybeTensor sinks) {
  AttentionArguments args{q, k, v};
  args.qv = qv;
  args.cu_seqlens_q = cu_seqlens_q;
  args.cu_seqlens_k = cu_seqlens_k;
  args.seqused_q = seqused_q;
  args.seqused_k = seqused_k;
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

std::tuple<Tensor, Tensor, Tensor> flash_attn_varlen_func_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, std::optional<int64_t> /*max_seqlen_q*/,
    std::optional<int64_t> /*max_seqlen_k*/, MaybeTensor seqused_q, MaybeTensor seqused_k,
    std::optional<double> softmax_scale, bool causal, std::vector<int64_t> window_size,
    int64_t attention_chunk, double softcap, bool /*deterministic*/, int64_t /*sm_margin*/,
    MaybeTensor dsoftmax_lse, MaybeTensor alibi_slopes) {
  AttentionArguments args{q, k, v};
  args.cu_seqlens_q = cu_seqlens_q;
  args.cu_seqlens_k = cu_seqlens_k;
  args.seqused_q = seqused_q;
  args.seqused_k = seqused_k;
  args.alibi_slopes = alibi_slopes;
  args.softmax_scale = softmax_scale;
  args.causal = causal;
  args.window_size = window_size;
  args.attention_chunk = attention_chunk;
  args.softcap = softcap;
  return AttentionCall(args).backward(dout, out, softmax_lse, dsoftmax_lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  using Forward = Overloads<flash_attn_varlen_func>;
  m.impl("flash_attn_varlen_func", TORCH_BOX(&Forward::fresh));
  m.impl("flash_attn_varlen_func.out", TORCH_BOX(&Forward::into));
  m.impl("flash_attn_varlen_func_backward", TORCH_BOX(&flash_attn_varlen_func_backward));
}

}  // namespace fa3npu
