// The schemas of every operator. Their meaning is in docs/design.md and in fa3_ops/reference.py;
// the names and the order of the arguments are FlashAttention-3's.
//
// An alias annotation marks what is written, so that a compiler keeps the write and its order. No
// operator returns an input: a result is always fresh memory.

#include <torch/csrc/stable/library.h>

// Arguments that several operators share, spelled once.
#define DESCALES "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
#define MASK                                                                  \
  "float? softmax_scale=None, bool causal=False, int[2] window_size=[-1,-1]," \
  " int attention_chunk=0, float softcap=0.0, "
// Not keyword-only: torch.library.register_autograd refuses keyword-only tensors.
#define BIAS "Tensor? alibi_slopes=None, Tensor? sinks=None"

// flash_attn_func and flash_attn_varlen_func, after the tensors and their lengths.
#define TRAINING                                                                             \
  "float? softmax_scale=None, bool causal=False, Tensor? qv=None, " DESCALES                 \
  "int[2] window_size=[-1,-1], int attention_chunk=0, float softcap=0.0, int num_splits=1, " \
  "bool? pack_gqa=None, bool deterministic=False, int sm_margin=0, " BIAS

#define VARLEN                                                                   \
  "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "   \
  "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? seqused_q=None, Tensor? " \
  "seqused_k=None, " TRAINING

#define KVCACHE                                                                                  \
  "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? qv=None, Tensor? cache_seqlens=None, "      \
  "Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, Tensor? page_table=None, "          \
  "Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, Tensor? seqused_q=None, " DESCALES MASK \
  "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "                     \
  "int sm_margin=0, " BIAS ", Tensor? cache_start=None"

#define WITH_KVCACHE                                                                       \
  "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, Tensor? v=None, "     \
  "Tensor? qv=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "                    \
  "Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, " \
  "Tensor? page_table=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k_new=None, "    \
  "SymInt? max_seqlen_q=None, Tensor? rotary_seqlens=None, " DESCALES MASK                 \
  "bool rotary_interleaved=True, Tensor? scheduler_metadata=None, int num_splits=0, "      \
  "bool? pack_gqa=None, int sm_margin=0, " BIAS                                            \
  ", Tensor? seqused_q=None, Tensor? cache_start=None"

#define BACKWARD                                                                          \
  "float? softmax_scale=None, bool causal=False, int[2] window_size=[-1,-1], "            \
  "int attention_chunk=0, float softcap=0.0, bool deterministic=False, int sm_margin=0, " \
  "Tensor? dsoftmax_lse=None, Tensor? alibi_slopes=None) -> (Tensor dq, Tensor dk, Tensor dv)"

STABLE_TORCH_LIBRARY(fa3npu, m) {
  m.def("flash_attn_func(Tensor q, Tensor k, Tensor v, " TRAINING
        ") -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "flash_attn_func_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor softmax_lse, " BACKWARD);

  m.def("flash_attn_varlen_func(" VARLEN ") -> (Tensor out, Tensor softmax_lse)");
  m.def("flash_attn_varlen_func.out(" VARLEN ", *, Tensor(a!) out) -> Tensor softmax_lse");
  m.def(
      "flash_attn_varlen_func_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor softmax_lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, Tensor? seqused_q=None, Tensor? seqused_k=None, " BACKWARD);

  // Composite: its body is fa3_ops/composite.py, so that symbolic sizes pass through it.
  m.def("flash_attn_with_kvcache(" WITH_KVCACHE ") -> (Tensor out, Tensor softmax_lse)");
  m.def("flash_attn_with_kvcache.out(" WITH_KVCACHE ", *, Tensor(c!) out) -> Tensor softmax_lse");

  m.def("flash_attn_kvcache(" KVCACHE ") -> (Tensor out, Tensor softmax_lse)");
  m.def("flash_attn_kvcache.out(" KVCACHE ", *, Tensor(a!) out) -> Tensor softmax_lse");
  m.def(
      "kvcache_append_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor cache_seqlens, Tensor? cache_batch_idx=None, Tensor? page_table=None, "
      "Tensor? cu_seqlens_k_new=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
      "Tensor? rotary_seqlens=None, bool rotary_interleaved=True, Tensor? k_descale=None, "
      "Tensor? v_descale=None) -> ()");
  m.def(
      "kvcache_scatter_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor? k_descale=None, Tensor? v_descale=None) -> ()");
  m.def(
      "apply_rotary(Tensor x, Tensor rotary_cos, Tensor rotary_sin, Tensor rotary_seqlens, "
      "Tensor? cu_seqlens=None, bool rotary_interleaved=True, bool advance=True) -> Tensor");

  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");

  m.def(
      "flash_attn_combine(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None)"
      " -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "get_scheduler_metadata(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "SymInt num_heads_q, SymInt num_heads_kv, SymInt headdim, Tensor cache_seqlens, "
      "ScalarType qkv_dtype, SymInt? headdim_v=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k_new=None, Tensor? cache_leftpad=None, SymInt? page_size=None, "
      "SymInt max_seqlen_k_new=0, bool causal=False, int[2] window_size=[-1,-1], "
      "int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, "
      "int sm_margin=0, float softcap=0.0, float? softmax_scale=None) -> Tensor");

  // The gradient of what has none: raises when it runs, so that a compiler can trace a backward
  // that nobody asks for.
  m.def("no_gradient(Tensor gradient, SymInt[] size, ScalarType dtype, str of) -> Tensor");

  m.def("cpu_capability() -> str");    // the instruction set that the CPU kernels run on
  m.def("cpu_capabilities() -> str");  // those this machine runs, best first: "AVX2, portable"
}
