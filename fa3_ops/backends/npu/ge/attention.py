"""Attention as CANN's FusedInferAttentionScore (FIA) in a GE graph. Lengths, masks and what FIA
does not do itself are computed in the graph. What GE cannot express is an error of the compiler.

The limits are those of CANN's documentation for Atlas A2 and A3. No NPU has run such a graph.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true
from torchair._ge_concrete_graph import ge_apis as ge
from torchair.ge import DataType
from torchair.ge._ge_graph import get_default_ge_graph

from fa3_ops.backends.call import sides_of
from fa3_ops.backends.npu.capabilities import FusedLimits, fused_limits
from fa3_ops.backends.npu.fused_infer_attention import BAND, CAUSAL, FAR
from fa3_ops.backends.npu.ge.graph import (
    GeTensor,
    Value,
    arange,
    concat,
    framed,
    full_like,
    refuse,
    sequence_of_row,
    size,
    static,
    tensor,
    where,
    without,
)

DENSE_PAGE = 128  # of dense caches that have to be read through a page table
MLA_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MASK_NAME = "fa3npu_upper_triangle"


def attention(a: SimpleNamespace) -> tuple[GeTensor, GeTensor]:
    """a holds the arguments of flash_attn_varlen_func and flash_attn_kvcache under their names
    there, k and seqused_k also for k_cache and cache_seqlens."""
    check_arguments(a)
    a.left, a.right = sides_of(a.window_size, a.causal)
    a.nheads, a.headdim = static(a.q, -2), static(a.q, -1)
    a.nheads_k, a.headdim_v = static(a.k, -2), static(a.v, -1)
    a.dense = a.q.rank == 4
    a.one_row = a.dense and statically_known_true(a.q.symsize[1] == 1)
    if a.one_row:  # it stands at the last key
        a.right = -1
    # Layout BSND ignores the window of a single row.
    window_of_one_row = a.one_row and a.left >= 0 and a.qv is None
    a.layout = "BSND" if a.dense and not window_of_one_row else "TND"
    as_pages(a)
    check_sizes(a)
    a.seqlens_k = keys_in_use(a)
    out, lse = fused_infer_attention_score(a)
    if a.layout == "BSND":
        lse = lse.remove(3)
    elif a.dense:  # lse is (batch_size, nheads, 1) already
        out = out.insert(1)
    else:
        lse = lse.remove(2).transpose(1, 0)
    if a.sinks is not None:
        out, lse = rescale_by_sinks(a, out, lse)
    out, lse = clear_blind_rows(a, out, lse)
    return out.tensor, lse.tensor


def check_dtype(name: str, x: GeTensor) -> None:
    if x.meta.dtype not in fused_limits().dense_dtypes:
        refuse(f"dtype {x.meta.dtype} of {name}", "it takes float16 and bfloat16")


def check_arguments(a: SimpleNamespace) -> None:
    check_dtype("q", a.q)
    check_dtype("k", a.k)
    for name, can in (
        ("softcap", "FIA has none"),
        ("alibi_slopes", "FIA has no linear bias"),
        ("attention_chunk", "FIA has causal masks and windows only"),
        ("cache_leftpad", "FIA reads a paged cache from its first key"),
        ("seqused_q", "every row of q has to count; pack q by cu_seqlens_q"),
    ):
        if getattr(a, name):
            refuse(name, can)
    if a.cu_seqlens_k is not None and a.seqused_k is not None:
        refuse("seqused_k with cu_seqlens_k", "packed keys are used in full; use a page_table")
    if a.cu_seqlens_k is not None and a.cu_seqlens_q is None:
        refuse("cu_seqlens_k without cu_seqlens_q", "packed keys need packed q")
    if a.cu_seqlens_k is not None and a.qv is not None:
        refuse("qv with cu_seqlens_k", "it takes keys in pages")


def check_sizes(a: SimpleNamespace) -> None:
    sizes = f"headdim {a.headdim} and headdim_v {a.headdim_v}"
    heads = f"nheads {a.nheads} and nheads_k {a.nheads_k}"
    can = fused_limits()
    equal = a.headdim == a.headdim_v and a.headdim in can.dense_headdims
    if a.qv is not None:
        if not can.latent:
            refuse("qv", f"{can.name} takes it with some masks only")
        latent = (a.headdim, a.headdim_v, a.nheads_k) == (64, 512, 1)
        if not latent or a.nheads not in MLA_HEADS:
            takes = "it takes 64, 512, a power of two up to 128, and 1"
            refuse(f"qv with {sizes}, {heads}", takes)
    elif a.layout == "TND":
        check_packed_sizes(a, can)
    elif not equal:
        refuse(sizes, f"they must be equal, multiples of 16 and at most {can.dense_headdims[-1]}")
    if a.nheads > can.max_heads or (a.qv is None and a.nheads > can.max_group * a.nheads_k):
        refuse(heads, f"nheads must be at most {can.max_heads} and {can.max_group} times nheads_k")
    if a.nheads_k * max(a.headdim, a.headdim_v) > can.max_token:
        refuse(f"{heads} with {sizes}", f"nheads_k times headdim must be at most {can.max_token}")
    packed = a.layout == "TND" or a.qv is not None
    page_sizes = can.decode_pages if a.one_row else can.prefill_pages
    if packed:
        page_sizes = can.page_sizes
    if a.page_size and a.page_size not in page_sizes:
        takes = "it takes no pages of packed q"
        if page_sizes:
            takes = f"it takes multiples of {page_sizes.step} up to {page_sizes[-1]}"
        refuse(f"page_size {a.page_size} in this call", takes)


def check_packed_sizes(a: SimpleNamespace, can: FusedLimits) -> None:
    """What goes in layout TND: packed q, or one row with a window."""
    sizes = f"headdim {a.headdim} and headdim_v {a.headdim_v}"
    heads = f"nheads {a.nheads} and nheads_k {a.nheads_k}"
    if a.q.meta.dtype not in can.dtypes:
        refuse(f"dtype {a.q.meta.dtype} of packed q", f"{can.name} takes {can.dtypes}")
    if (a.headdim, a.headdim_v) not in can.headdims:
        takes = f"{can.name} takes {', '.join(map(str, sorted(can.headdims)))}"
        refuse(f"{sizes} of packed q, or of one row with a window", takes)
    if can.equal_heads and not (a.nheads == a.nheads_k and a.nheads in can.equal_heads):
        refuse(f"{heads} of packed q", f"{can.name} takes equal ones, {can.equal_heads}")
    causal = a.left < 0 and a.right == 0
    if not causal and not (can.band and a.headdim_v == can.band_headdim_v):
        takes = f"headdim_v must be {can.band_headdim_v}" if can.band else f"{can.name} has no band"
        refuse(f"{sizes} of packed q without a causal mask", takes)


def as_pages(a: SimpleNamespace) -> None:
    """Dense keys become pages where FIA takes no others. cache_batch_idx is spent."""
    entries, a.cache_batch_idx = a.cache_batch_idx, None
    a.page_size = 0 if a.page_table is None else static(a.k, 1)
    if a.page_table is not None and entries is not None:
        a.page_table = Value(a.page_table)[entries].tensor
    if a.page_table is not None and a.left >= 0:  # pages before a window may have any id
        a.page_table = Value(a.page_table).maximum(0).minimum(size(a.k, 0) - 1).tensor
    dense_keys = a.page_table is None and a.cu_seqlens_k is None
    if dense_keys and (entries is not None or a.qv is not None or a.layout == "TND"):
        capacity = static(a.k, 1)
        if capacity % DENSE_PAGE:
            with_what = "cache_batch_idx, packed q, qv or a window of one row"
            can = f"it is read as pages of {DENSE_PAGE}, which must divide it"
            refuse(f"a dense cache of {capacity} keys with {with_what}", can)
        entry = arange(0, size(a.k, 0)) if entries is None else Value(entries)
        pages = arange(0, capacity // DENSE_PAGE)
        a.page_table = (entry.reshape(-1, 1) * (capacity // DENSE_PAGE) + pages).tensor
        a.page_size = DENSE_PAGE
        if a.seqused_k is None:
            a.seqused_k = full_like(entry, capacity).tensor


def keys_in_use(a: SimpleNamespace) -> GeTensor | None:
    """(batch_size,) int32; None where dense keys all count."""
    if a.cu_seqlens_k is not None:
        seqlens = without(a.cu_seqlens_k, first=True) - without(a.cu_seqlens_k, first=False)
        return seqlens.tensor
    if a.seqused_k is not None or a.page_table is None:
        return a.seqused_k
    shape = Value(ge.Shape(a.page_table))
    return ge.Fill(shape[[0]].tensor, (shape[1] * a.page_size).tensor)


def lengths(a: SimpleNamespace) -> tuple[Value | None, Value | None]:
    """actual_seq_lengths and actual_seq_lengths_kv. In layout TND the first are cumulative, the
    second too unless paged, and CANN wants the last ones to be the sizes of q and k: one more
    sequence holds the rows behind the last one. Packed keys have another in front."""
    if a.layout == "BSND":
        return None, None if a.seqlens_k is None else Value(a.seqlens_k)
    if a.dense:
        return arange(1, size(a.q, 0) + 1), Value(a.seqlens_k)
    if a.cu_seqlens_k is not None:
        ends = concat(a.cu_seqlens_q, size(a.q, 0))
        return ends, concat(a.cu_seqlens_k, size(a.k, 0))
    a.page_table = ge.Pad(a.page_table, tensor([[0, 1], [0, 0]]))
    ends = concat(without(a.cu_seqlens_q, first=True).tensor, size(a.q, 0))
    return ends, concat(a.seqlens_k, 0)


def upper_triangle() -> GeTensor:
    """(2048, 2048) bool, true where a key is masked: the mask of sparse_mode 3 and 4, built once
    in each graph."""
    for node in get_default_ge_graph().op:
        if node.name == MASK_NAME:
            return ge.Tensor(node)
    row = arange(0, 2048)
    return ge.Less(row.reshape(-1, 1).tensor, row.tensor, node_name=MASK_NAME)


def fused_infer_attention_score(a: SimpleNamespace) -> tuple[Value, Value]:
    """out, and softmax_lse as (batch_size, nheads, seqlen_q, 1) or (total_q, nheads, 1)."""
    q, k, v = (Value(x) for x in (a.q, a.k, a.v))
    width = a.headdim if a.qv is None else a.headdim + a.headdim_v
    if a.layout == "TND" and a.dense:
        q = q.reshape(-1, a.nheads, a.headdim)
    if a.page_size:
        k = k.reshape(-1, a.page_size, a.nheads_k * a.headdim)
        v = v.reshape(-1, a.page_size, a.nheads_k * a.headdim_v)
    query, key, query_rope, key_rope = q.tensor, k.tensor, None, None
    if a.qv is not None:  # scores are q k + qv v
        query, key, query_rope, key_rope = a.qv, v.tensor, q.tensor, k.tensor
    seqlens_q, seqlens_k = lengths(a)
    sparse_mode = BAND if a.left >= 0 or a.right > 0 else CAUSAL if a.right == 0 else 0
    if a.layout == "TND" and sparse_mode == 0:
        sparse_mode = BAND
    band = {
        "pre_tokens": a.left if a.left >= 0 else FAR,
        "next_tokens": a.right if a.right >= 0 else FAR,
    }
    names = inspect.signature(ge.FusedInferAttentionScore).parameters.values()
    inputs: dict[str, Any] = {p.name: None for p in names if p.kind is p.POSITIONAL_OR_KEYWORD}
    inputs |= {
        "query": query,
        "key": [key],
        "value": [v.tensor],
        "atten_mask": upper_triangle() if sparse_mode else None,
        "actual_seq_lengths": seqlens_q and seqlens_q.to(DataType.DT_INT64).tensor,
        "actual_seq_lengths_kv": seqlens_k and seqlens_k.to(DataType.DT_INT64).tensor,
        "block_table": a.page_table,
        "query_rope": query_rope,
        "key_rope": key_rope,
    }
    out, lse = ge.FusedInferAttentionScore(
        **inputs,
        num_heads=a.nheads,
        num_key_value_heads=a.nheads_k,
        scale=width**-0.5 if a.softmax_scale is None else a.softmax_scale,
        input_layout=a.layout,
        sparse_mode=sparse_mode,
        block_size=a.page_size,
        softmax_lse_flag=True,  # with qv, CANN's documentation knows none; vLLM-Ascend uses it
        **(band if sparse_mode == BAND else {}),
    )
    return Value(out), Value(lse)


def rescale_by_sinks(a: SimpleNamespace, out: Value, lse: Value) -> tuple[Value, Value]:
    """A sink is one more key, without a value. FIA has learnable_sink, but CANN does not say
    whether its softmax_lse counts the sink."""
    sink = Value(a.sinks).to(DataType.DT_FLOAT).reshape(-1, 1)
    above = lse - sink
    weight = Value(ge.Sigmoid(above.tensor))
    weight = (weight.transpose(0, 2, 1) if a.dense else weight.transpose(1, 0)).insert(a.q.rank - 1)
    out = (out.to(DataType.DT_FLOAT) * weight).to(a.q.dtype)
    rest = ge.Log1p(ge.Exp(ge.Neg(ge.Abs(above.tensor))))
    return out, lse.maximum(sink) + Value(rest)


def clear_blind_rows(a: SimpleNamespace, out: Value, lse: Value) -> tuple[Value, Value]:
    """out 0 and softmax_lse -inf for rows that see no key or belong to no sequence."""
    if a.dense:
        seqlen_q, seqlen_k = a.q.symsize[1], a.k.symsize[1]
        if a.seqlens_k is None and (
            a.right < 0 or statically_known_true(seqlen_q <= seqlen_k + a.right)
        ):
            return out, lse
        keys = Value(size(a.k, 1) if a.seqlens_k is None else a.seqlens_k).reshape(-1, 1)
    else:
        row = arange(0, size(a.q, 0))
        sequence = sequence_of_row(a.cu_seqlens_q, row)
        keys = framed(a.seqlens_k, 0)[sequence]
    last: Any = -1  # the last key that a row sees, from the end of the keys
    if a.right >= 0:
        if a.dense:
            last = arange(0, size(a.q, 1)) - size(a.q, 1)
        else:
            last = row - concat(a.cu_seqlens_q, size(a.q, 0))[sequence]
        if a.right > 0:
            last = (last + a.right).minimum(-1)
    blind = keys + last < 0
    zero = ge.Const(0.0, dtype=a.q.dtype)
    out = where(blind.insert(a.q.rank - 2, a.q.rank - 1), zero, out)
    return out, where(blind.insert(1) if a.dense else blind, float("-inf"), lse)
