"""Checks of what users pass, from shapes, dtypes and devices: no tensor is read unless it is a
small CPU tensor in eager mode. The kernel checks what else depends on values (see errors.py).

Every call pays for these, and the shortest call takes some 15 microseconds: what only words an
error is made once there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64)
MAX_HEADDIM = 512


def shape(t: Tensor, expected: Sequence[object], name: str) -> torch.Size:
    """The shape of t, if it is the expected one; a string in that names a free dimension."""
    sizes = t.shape
    if len(sizes) == len(expected):
        for i, want in enumerate(expected):
            if type(want) is not str and sizes[i] != want:
                break
        else:
            return sizes
    wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
    raise ValueError(f"{name} must have shape ({wanted}), got {tuple(sizes)}")


def dtype(t: Tensor, expected: torch.dtype, name: str, why: str = "") -> None:
    if t.dtype is not expected:
        raise TypeError(f"{name} must have dtype {expected}{why}, got {t.dtype}")


def contiguous_rows(t: Tensor, name: str) -> None:
    """What is written in place cannot be copied first."""
    stride = t.stride()[-1]
    if stride != 1 and t.shape[-1] != 1:
        raise ValueError(f"{name} must have a contiguous last dimension, got stride {stride}")


def lengths(t: Tensor | None, size: object, name: str) -> None:
    """An optional int32 vector."""
    if t is None:
        return
    dtype(t, torch.int32, name)
    sizes = t.shape
    if len(sizes) != 1 or (type(size) is not str and sizes[0] != size):  # a loop costs more
        shape(t, (size,), name)


def values(t: Tensor | None) -> list[int] | None:
    """The values of a CPU tensor, or None where looking would synchronise or is impossible."""
    if t is None or type(t) is not torch.Tensor or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    return t.tolist() if t.device.type == "cpu" else None


def offsets(t: Tensor | None, total: int, name: str) -> None:
    """cu_seqlens: not negative, not falling, within the rows they index."""
    seen = values(t)
    if not seen:
        return
    for i, (begin, end) in enumerate(zip([0, *seen], seen, strict=False)):
        if begin > end:
            raise ValueError(
                f"{name} must not fall, got {begin} followed by {end} at index {i - 1}"
                if i
                else f"{name}[0] must not be negative, got {end}"
            )
    if seen[-1] > total:
        raise ValueError(
            f"{name}[{len(seen) - 1}] must be at most the {total} rows of its tensor, "
            f"got {seen[-1]}"
        )


def same_device(q: Tensor, others: Mapping[str, Tensor | None]) -> None:
    device = q.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on the device of q, {device}, got {t.device}")


def constants(*numbers: float | None) -> tuple[Any, ...]:
    """Numbers of the schema, which a compiler may have made symbols, as numbers: another value is
    another graph already where it is traced. An operator would make it so further down, where
    Inductor's cache of AOTAutograd does not see it: it would take the graph of the old number."""
    return tuple(n if n is None else guard_scalar(n) for n in numbers)


def softmax(
    softmax_scale: float | None, window_size: Sequence[int], attention_chunk: int, softcap: float
) -> None:
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    if attention_chunk < 0:
        raise ValueError(f"attention_chunk must be at least 0, got {attention_chunk}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and at least 0, got {softcap}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_name: str = "k",
    v_name: str = "v",
    seqused_k_name: str = "seqused_k",
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> int:
    """What every attention operator asks of its arguments; returns the batch size."""
    q_dtype = q.dtype
    if q_dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"q must have one of the dtypes {names}, got {q_dtype}")
    dtype(k, q_dtype, k_name, " like q")
    dtype(v, q_dtype, v_name, " like q")

    if cu_seqlens_q is None:
        q_shape = shape(q, ("batch_size", "seqlen_q", "nheads", "headdim"), "q")
        batch_size, _, nheads, headdim = q_shape
    else:
        q_shape = shape(q, ("total_q", "nheads", "headdim"), "q")
        _, nheads, headdim = q_shape
        lengths(cu_seqlens_q, "batch_size + 1", "cu_seqlens_q")
        if max_seqlen_q is None:
            raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
        batch_size = cu_seqlens_q.shape[0] - 1

    if cu_seqlens_k is not None:
        if page_table is not None:
            raise ValueError("page_table must be None when cu_seqlens_k is given, got a tensor")
        if max_seqlen_k is None:
            raise ValueError("max_seqlen_k must be given with cu_seqlens_k, got None")
        total_k, nheads_k, _ = shape(k, ("total_k", "nheads_k", headdim), k_name)
        headdim_v = shape(v, (total_k, nheads_k, "headdim_v"), v_name)[-1]
        lengths(cu_seqlens_k, batch_size + 1, "cu_seqlens_k")
    else:
        rows = batch_size if cache_batch_idx is None else "batch_size_cache"
        if page_table is None:
            k_shape = shape(k, (rows, "seqlen_k", "nheads_k", headdim), k_name)
        else:
            k_shape = shape(k, ("num_pages", "page_size", "nheads_k", headdim), k_name)
            dtype(page_table, torch.int32, "page_table")
            shape(page_table, (rows, "max_num_pages_per_seq"), "page_table")
            same_device(q, {"page_table": page_table})
        first, keys, nheads_k, _ = k_shape
        headdim_v = shape(v, (first, keys, nheads_k, "headdim_v"), v_name)[-1]

    if nheads_k == 0 or nheads % nheads_k != 0:
        raise ValueError(
            f"nheads of q must be a multiple of nheads_k of {k_name}, got {nheads} and {nheads_k}"
        )
    if not 1 <= headdim <= MAX_HEADDIM:
        raise ValueError(f"headdim must be in [1, {MAX_HEADDIM}], got {headdim}")
    if not 1 <= headdim_v <= MAX_HEADDIM:
        raise ValueError(f"headdim_v must be in [1, {MAX_HEADDIM}], got {headdim_v}")
    if qv is not None:
        shape(qv, (*q_shape[:-1], headdim_v), "qv")
        dtype(qv, q_dtype, "qv", " like q")
        same_device(q, {"qv": qv})

    lengths(seqused_q, batch_size, "seqused_q")
    lengths(seqused_k, batch_size, seqused_k_name)
    lengths(cache_batch_idx, batch_size, "cache_batch_idx")
    lengths(cache_leftpad, batch_size, "cache_leftpad")
    if q_dtype is torch.float8_e4m3fn:
        for name, t in (
            ("q_descale", q_descale),
            ("k_descale", k_descale),
            ("v_descale", v_descale),
        ):
            if t is not None:
                dtype(t, torch.float32, name)
                shape(t, (batch_size, nheads_k), name)
                same_device(q, {name: t})
    if alibi_slopes is not None:
        per_batch = (batch_size, nheads) if alibi_slopes.dim() == 2 else (nheads,)
        shape(alibi_slopes, per_batch, "alibi_slopes")
        dtype(alibi_slopes, torch.float32, "alibi_slopes")
        same_device(q, {"alibi_slopes": alibi_slopes})
    if sinks is not None:
        shape(sinks, (nheads,), "sinks")
        if not sinks.is_floating_point():
            raise TypeError(f"sinks must have a floating-point dtype, got {sinks.dtype}")
        same_device(q, {"sinks": sinks})
    if out is not None:
        shape(out, (*q_shape[:-1], headdim_v), "out")
        fp8 = q_dtype is torch.float8_e4m3fn
        dtype(out, torch.bfloat16 if fp8 else q_dtype, "out")
        contiguous_rows(out, "out")
        same_device(q, {"out": out})
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError("out must be None where a gradient is needed, got a tensor")
    softmax(softmax_scale, window_size, attention_chunk, softcap)
    if num_splits < 0:
        raise ValueError(f"num_splits must be at least 0 (0: chosen for you), got {num_splits}")

    others = {
        k_name: k,
        v_name: v,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        seqused_k_name: seqused_k,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
    }
    same_device(q, others)
    return batch_size


def append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    batch_size: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_seqlens: Tensor | None,
) -> None:
    """What flash_attn_with_kvcache asks of new keys and values and of their rotation."""
    contiguous_rows(k_cache, "k_cache")
    contiguous_rows(v_cache, "v_cache")
    if k is None:
        # Serving code passes rotary_seqlens on every call, so alone it is not a mistake.
        for name, t in (
            ("v", v),
            ("rotary_cos", rotary_cos),
            ("rotary_sin", rotary_sin),
            ("cu_seqlens_k_new", cu_seqlens_k_new),
        ):
            if t is not None:
                raise ValueError(f"{name} must come with new keys k, got k=None")
        return
    if v is None:
        raise ValueError("v must be given with k, got None")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k, got None")
    nheads_k, headdim, headdim_v = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
    if cu_seqlens_k_new is None:
        shape(k, (batch_size, "seqlen_new", nheads_k, headdim), "k")
        shape(v, (batch_size, k.shape[1], nheads_k, headdim_v), "v")
    else:
        shape(k, ("total_k_new", nheads_k, headdim), "k")
        shape(v, (k.shape[0], nheads_k, headdim_v), "v")
        lengths(cu_seqlens_k_new, batch_size + 1, "cu_seqlens_k_new")
    dtype(k, k_cache.dtype, "k", " like k_cache")
    dtype(v, v_cache.dtype, "v", " like v_cache")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together, got one of them")
    if rotary_cos is not None and rotary_sin is not None:
        shape(rotary_cos, ("seqlen_ro", "rotary_dim / 2"), "rotary_cos")
        shape(rotary_sin, tuple(rotary_cos.shape), "rotary_sin")
        dtype(rotary_cos, q.dtype, "rotary_cos", " like q")
        dtype(rotary_sin, q.dtype, "rotary_sin", " like q")
        if rotary_cos.shape[1] * 2 > headdim:
            raise ValueError(
                f"rotary_dim must be at most headdim, {headdim}, got {rotary_cos.shape[1] * 2}"
            )
    lengths(rotary_seqlens, batch_size, "rotary_seqlens")
    others = {
        "k": k,
        "v": v,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_seqlens": rotary_seqlens,
    }
    same_device(q, others)
    # The append checks the rest before it writes; these two are read after it, by the attention.
    offsets(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    pads, seqlens = values(cache_leftpad), values(cache_seqlens)
    if pads is not None and seqlens is not None:
        for b, (pad, seqlen) in enumerate(zip(pads, seqlens, strict=True)):
            if not 0 <= pad <= seqlen:
                raise ValueError(f"cache_leftpad[{b}] must be in [0, {seqlen}], got {pad}")
