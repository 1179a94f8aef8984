"""Converters from our operators to CANN's graph engine (GE), for torchair's backend "npu".

torchair.py imports this file once torchair is loaded. kvcache_append_ and kvcache_scatter_ become
ScatterPaKvCache, which writes the caches in place, attention FusedInferAttentionScore
(attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torchair.ge import DataType, attr, custom_op

from fa3_ops.backends.npu.ge.attention import attention, check_dtype
from fa3_ops.backends.npu.ge.graph import (
    GeTensor,
    Value,
    arange,
    by_transposed,
    concat,
    framed,
    full_like,
    int64,
    refuse,
    sequence_of_row,
    size,
    static,
    where,
)
from fa3_ops.ops.schema import COMMON_NAMES, bind


def kvcache_append(a: SimpleNamespace) -> None:
    """The scatter is the last operator and takes the caches as they come: by this torchair sees
    that it needs no copies of them."""
    if a.rotary_cos is not None:
        can = "flash_attn_with_kvcache rotates k before it"
        refuse("rotary_cos of kvcache_append_", can)
    check_caches(a)
    k, v = (Value(x).reshape(-1, static(x, -2), static(x, -1)) for x in (a.k, a.v))
    scatter(a, k, v, slot_mapping(a))


def kvcache_scatter(a: SimpleNamespace) -> None:
    """A slot behind the end of the cache becomes a negative one, which is skipped."""
    check_caches(a)
    capacity = int64(static(a.k_cache, 0) * static(a.k_cache, 1))
    slot = Value(a.slot_mapping).to(DataType.DT_INT64)
    k, v = Value(a.k), Value(a.v)
    if a.k.symsize[0] != a.slot_mapping.symsize[0]:  # the rows behind are padding
        row = arange(0, size(a.slot_mapping, 0))
        k, v = k[row], v[row]
    scatter(a, k, v, where(slot < capacity, slot, int64(-1)))


def check_caches(a: SimpleNamespace) -> None:
    for name, cache in (("k_cache", a.k_cache), ("v_cache", a.v_cache)):
        check_dtype(name, cache)
        if not cache.meta.is_contiguous():
            refuse(f"strides {cache.meta.stride()} of {name}", "it takes contiguous caches")


def scatter(a: SimpleNamespace, k: Value, v: Value, slots: Value) -> None:
    custom_op(
        "ScatterPaKvCache",
        inputs={
            "key": k.tensor,
            "key_cache": a.k_cache,
            "slot_mapping": slots.tensor,
            "value": v.tensor,
            "value_cache": a.v_cache,
            "compress_lens": None,
            "compress_seq_offset": None,
            "seq_lens": None,
        },
        attrs={"cache_mode": attr.Str("Norm")},
        outputs=["key_cache", "value_cache"],
    )


def slot_mapping(a: SimpleNamespace) -> Value:
    """(tokens,): entry * rows + row of the cache as (entries, rows, ...), or -1, which CANN's
    kernel skips, for a token of no sequence and for one behind the end of its cache."""
    rows = static(a.k_cache, 1)
    pages = 1 if a.page_table is None else size(a.page_table, 1)
    capacity = pages * rows
    entries = a.cache_batch_idx
    if entries is None:
        entries = arange(0, size(a.cache_seqlens, 0)).tensor
    if a.cu_seqlens_k_new is None:
        entry = Value(entries).reshape(-1, 1)
        position = Value(a.cache_seqlens).reshape(-1, 1) + arange(0, size(a.k, 1))
    else:
        sequence, row = rows_of_sequences(a.cu_seqlens_k_new, size(a.k, 0))
        entry = framed(entries, 0)[sequence]
        position = framed(a.cache_seqlens, capacity)[sequence] + row
    if a.page_table is None:
        slot = entry * rows + position
    else:
        page = (position // rows).minimum(pages - 1)
        slot = Value(a.page_table).reshape(-1)[entry * pages + page] * rows + position % rows
    return where(position < capacity, slot, -1).reshape(-1)


def rows_of_sequences(cu_seqlens: GeTensor, total: Any) -> tuple[Value, Value]:
    """The sequence of each packed row, as sequence_of_row has it, and the row's place in it."""
    row = arange(0, total)
    sequence = sequence_of_row(cu_seqlens, row)
    return sequence, row - concat(0, cu_seqlens)[sequence]


def apply_rotary(a: SimpleNamespace) -> GeTensor:
    """In float32, rounded once; positions are bounded by rotary_cos."""
    if a.cu_seqlens is None:
        first, row = Value(a.rotary_seqlens).reshape(-1, 1), arange(0, size(a.x, 1))
    else:
        sequence, row = rows_of_sequences(a.cu_seqlens, size(a.x, 0))
        first = framed(a.rotary_seqlens, 0)[sequence]
    position = first + (row if a.advance else row * 0)
    position = position.minimum(static(a.rotary_cos, 0) - 1).maximum(0)
    axis, width, half = a.x.rank - 1, static(a.x, -1), static(a.rotary_cos, 1)
    cos, sin = (
        Value(table)[position].to(DataType.DT_FLOAT).insert(axis - 1)
        for table in (a.rotary_cos, a.rotary_sin)
    )
    columns = list(range(width))
    if a.rotary_interleaved:  # pair i is columns 2i and 2i + 1
        columns[: 2 * half] = [*range(0, 2 * half, 2), *range(1, 2 * half, 2)]
    x = Value(a.x).gather(columns, axis).to(DataType.DT_FLOAT)
    left, right = x.gather(list(range(half)), axis), x.gather(list(range(half, 2 * half)), axis)
    turned = [left * cos - right * sin, left * sin + right * cos]
    if 2 * half < width:
        turned.append(x.gather(list(range(2 * half, width)), axis))
    y = concat(*(part.tensor for part in turned), axis=axis).to(a.x.dtype)
    y = y.gather(sorted(range(width), key=columns.__getitem__), axis)
    if a.cu_seqlens is not None:  # rows of no sequence stay
        ones = full_like(Value(a.rotary_seqlens), 1)
        inside = framed(ones.tensor, 0)[sequence]
        y = where((inside < 1).insert(1, 2), a.x, y)
    return y.tensor


def linear(a: SimpleNamespace) -> GeTensor:
    """CANN's MatMul, which does not promise that a row's bits are its own."""
    out = by_transposed(Value(a.x).reshape(-1, static(a.x, -1)), a.weight)
    out = out if a.bias is None else out + a.bias
    sizes = (size(a.x, axis) for axis in range(a.x.rank - 1))
    return out.of_shape(concat(*sizes, static(a.weight, 0))).tensor


def refuse_operator(a: SimpleNamespace) -> None:
    refuse(
        f"the operator {a.operator}",
        "it has attention, the writes of caches, apply_rotary and linear",
    )


CONVERTERS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "flash_attn_func": attention,
    "flash_attn_varlen_func": attention,
    "flash_attn_kvcache": attention,
    "kvcache_append_": kvcache_append,
    "kvcache_scatter_": kvcache_scatter,
    "linear": linear,
    "apply_rotary": apply_rotary,
    "flash_attn_func_backward": refuse_operator,
    "flash_attn_varlen_func.out": refuse_operator,
    "flash_attn_varlen_func_backward": refuse_operator,
    "flash_attn_kvcache.out": refuse_operator,
    "flash_attn_combine": refuse_operator,
    "get_scheduler_metadata": refuse_operator,
}
NOT_IN_EVERY_ATTENTION = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "cache_batch_idx",
    "cache_leftpad",
    "page_table",
)


def converter(op: torch._ops.OpOverload, lower: Callable[[SimpleNamespace], Any]) -> Any:
    """torchair passes arguments as the FX graph has them, without defaults."""

    def convert(*args: Any, **kwargs: Any) -> Any:
        given = bind(op, args, kwargs)
        if lower is attention:
            given = {COMMON_NAMES.get(name, name): value for name, value in given.items()}
            given = dict.fromkeys(NOT_IN_EVERY_ATTENTION) | given
        return lower(SimpleNamespace(**given, operator=op))

    return convert


def register(register_fx_node_ge_converter: Callable[[Any], Callable[[Any], Any]]) -> None:
    for name, lower in CONVERTERS.items():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.fa3npu, packet), overload or "default")
        register_fx_node_ge_converter(op)(converter(op, lower))
