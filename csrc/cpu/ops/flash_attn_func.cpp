// flash_attn_func and flash_attn_func_backward on CPU: dense (batch, seqlen, nheads, headdim).

#include <torch/csrc/stable/library.h>

#include "cpu/ops/arguments.h"

namespace fa3npu {
namespace {

std::tuple<Tensor, Tensor> flash_attn_func(
    Tensor q, Tensor k, Tensor v, std::optional<double> softmax_scale, bool causal, MaybeTensor qv,
    MaybeTensor q_descale, MaybeTensor k_descale, MaybeTensor v_descale,
    std::vector<int64_t> window_size, int64_t attention_chunk, double softcap,
    int64_t /*num_splits*/, std::optional<bool> /*pack_gqa*/, bool /*deterministic*/,
    int64_t /*sm_margin*/, MaybeTensor alibi_slopes, MaybeTensor sinks) {
  AttentionArguments args{q, k, v};
  args.qv = qv;
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
  return AttentionCall(args).forward(std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> flash_attn_func_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    std::optional<double> softmax_scale, bool causal, std::vector<int64_t> window_size,
    int64_t attention_chunk, double softcap, bool /*deterministic*/, int64_t /*sm_margin*/,
    MaybeTensor dsoftmax_lse, MaybeTensor alibi_slopes) {
  AttentionArguments args{q, k, v};
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
  m.impl("flash_attn_func", TORCH_BOX(&flash_attn_func));
  m.impl("flash_attn_func_backward", TORCH_BOX(&flash_attn_func_backward));
}

}  // namespace fa3npu
