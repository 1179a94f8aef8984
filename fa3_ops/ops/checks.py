"""Checks of what users pass, from shapes, dtypes and devices: no tensor is read unless it is a
small CPU tensor in eager mode. The kernel checks what else depends on values (see errors.py).

Every call pays for these, and the shortest call takes some 15 microseconds: what only words an
error is made once there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64)
# Of k and v beside a q of 16 or 32 bits, times a descale.
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
WIDE = (torch.float32, torch.float16, torch.bfloat16)
METADATA_DTYPES = (torch.int32, torch.uint8)
MAX_HEADDIM = 512
OPTIONAL = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q"),
    *("cache_batch_idx", "cache_leftpad", "cache_start", "page_table"),
)


def shape(t: Tensor, expected: Sequence[object], name: str, because: str = "") -> torch.Size:
    """The shape of t, if it is the expected one; a string in that names a free dimension. `because`
    says what decided on its rank."""
    sizes = t.shape
    if len(sizes) == len(expected):
        for i, want in enumerate(expected):
            if type(want) is not str and sizes[i] != want:
                break
        else:
            return sizes
    wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
    got = f"{tuple(sizes)}{because if len(sizes) != len(expected) else ''}"
    raise ValueError(f"{name} must have shape ({wanted}), got {got}")


def dtype(t: Tensor, expected: torch.dtype, name: str, why: str = "") -> None:
    if t.dtype is not expected:
        raise TypeError(f"{name} must have dtype {expected}{why}, got {t.dtype}")


def contiguous_rows(t: Tensor, name: str) -> None:
    """What is written in place cannot be copied first."""
    stride = t.stride()[-1]
    if stride != 1 and t.shape[-1] != 1:
        raise ValueError(f"{name} must have a contiguous last dimension, got stride {stride}")


def strided(*tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and t.layout is not torch.strided:
            raise ValueError(f"every tensor must be strided, got one of layout {t.layout}")


def ints64(**arguments: Any) -> None:
    """An operator's ints; Python's may be larger."""
    for name, value in arguments.items():
        for n in value if isinstance(value, Sequence) else (value,):
            if type(n) is int and not -(2**63) <= n < 2**63:  # no symbol
                raise ValueError(f"{name} must be a 64-bit integer, got {n}")


def not_negated(t: Tensor, name: str) -> None:
    if t.is_neg():
        raise ValueError(f"{name} is written and must not be a lazily negated view, got one")


def writable(t: Tensor, name: str) -> None:
    """What is written needs a place for every element; the kernel says so too, but later."""
    if torch.compiler.is_compiling():
        return
    not_negated(t, name)
    if t.is_contiguous() or t.numel() == 0:
        return
    reach = 0  # from the first to the last element of the dimensions before
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            raise ValueError(
                f"{name} must have a place for every element, got elements that share one: shape "
                f"{tuple(t.shape)}, a stride of {stride}"
            )
        reach += (size - 1) * stride


def lengths(t: Tensor | None, size: object, name: str) -> None:
    """An optional int32 vector."""
    if t is None:
        return
    dtype(t, torch.int32, name)
    sizes = t.shape
    if len(sizes) != 1 or (type(size) is not str and sizes[0] != size):  # a loop costs more
        shape(t, (size,), name)


def lengths_at_least(t: Tensor | None, least: object, name: str) -> None:
    """An optional int32 vector, of which what lies behind counts for nothing."""
    if t is None:
        return
    dtype(t, torch.int32, name)
    if t.dim() != 1 or t.shape[0] < least:  # type: ignore[operator]
        raise ValueError(f"{name} must have at least {least} elements, got shape {tuple(t.shape)}")


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


def packed_lengths(seqused_k: Tensor, q: Tensor, cu_seqlens_q: Tensor | None, k: Tensor) -> None:
    """Lengths of sequences that lie back to back in k."""
    same_device(q, {"k": k, "seqused_k": seqused_k, "cu_seqlens_q": cu_seqlens_q})
    lengths(cu_seqlens_q, "batch_size + 1", "cu_seqlens_q")
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if cu_seqlens_q is None:
        shape(q, ("batch_size", "seqlen_q", "nheads", "headdim"), "q", " without cu_seqlens_q")
    lengths(seqused_k, batch_size, "seqused_k")
    seen = values(seqused_k) or [0]
    if min(seen) < 0:
        raise ValueError(f"seqused_k must not be negative, got {min(seen)}")
    if sum(seen) > k.shape[0]:
        raise ValueError(
            f"seqused_k must sum to at most the {k.shape[0]} rows of k, got {sum(seen)}"
        )


def packed_cache(
    k_cache: Tensor,
    cache_seqlens: Tensor | None,
    rotary_seqlens: Tensor | None,
    **others: Tensor | None,
) -> None:
    """What does not go with packed keys, of which cache_seqlens says where they lie."""
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with a 3-dimensional k_cache, got None")
    lengths(rotary_seqlens, "batch_size", "rotary_seqlens")
    same_device(k_cache, {"rotary_seqlens": rotary_seqlens}, "k_cache")
    for name, t in others.items():
        if t is not None:
            raise ValueError(f"{name} must be None with a 3-dimensional k_cache, got a tensor")


def same_device(q: Tensor, others: Mapping[str, Tensor | None], q_name: str = "q") -> None:
    device = q.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on the device of {q_name}, {device}, got {t.device}")


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
        raise ValueError(f"window_size must be (left, right), got {tuple(window_size)}")
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
    cache_start: Tensor | None = None,
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
    scheduler_metadata: Tensor | None = None,
) -> int:
    """What every attention operator asks of its arguments; returns the batch size."""
    q_dtype, device = q.dtype, q.device
    if q_dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"q must have one of the dtypes {names}, got {q_dtype}")
    if k.dtype is not q_dtype or v.dtype is not q_dtype:
        _narrow(q, k, v, k_name, v_name)
    others = (
        k, v, seqused_k, cu_seqlens_q, cu_seqlens_k, seqused_q, cache_batch_idx, cache_leftpad,
        cache_start, page_table,
    )  # fmt: skip
    for t in others:
        if t is not None and t.device != device:
            named = zip((k_name, v_name, seqused_k_name, *OPTIONAL), others, strict=True)
            same_device(q, dict(named))
    batch_size, nheads, headdim = _rows(q, cu_seqlens_q, max_seqlen_q)
    if cu_seqlens_k is not None:
        _packed_only(page_table, max_seqlen_k)
        lengths(cu_seqlens_k, batch_size + 1, "cu_seqlens_k")
        total_k, nheads_k, _ = shape(
            k, ("total_k", "nheads_k", headdim), k_name, " with cu_seqlens_k"
        )
        headdim_v = shape(v, (total_k, nheads_k, "headdim_v"), v_name)[-1]
    else:
        entries = batch_size if cache_batch_idx is None else "batch_size_cache"
        because = "" if cu_seqlens_q is None else " without cu_seqlens_k"
        keys = (entries, "seqlen_k", "nheads_k", headdim)
        if page_table is not None:
            dtype(page_table, torch.int32, "page_table")
            shape(page_table, (entries, "max_num_pages_per_seq"), "page_table")
            keys, because = ("num_pages", "page_size", "nheads_k", headdim), " with page_table"
        first, rows, nheads_k, _ = shape(k, keys, k_name, because)
        headdim_v = shape(v, (first, rows, nheads_k, "headdim_v"), v_name)[-1]
    if nheads_k == 0 or nheads % nheads_k or not 0 < headdim <= MAX_HEADDIM >= headdim_v > 0:
        _refuse_heads(nheads, nheads_k, headdim, headdim_v, k_name)

    lengths(seqused_q, batch_size, "seqused_q")
    if cu_seqlens_q is not None:
        _no_dummy_row(seqused_k, batch_size, seqused_k_name)
    lengths(seqused_k, batch_size, seqused_k_name)
    lengths(cache_batch_idx, batch_size, "cache_batch_idx")
    lengths(cache_leftpad, batch_size, "cache_leftpad")
    lengths(cache_start, batch_size, "cache_start")
    if not (q_descale is k_descale is v_descale is scheduler_metadata is None):
        given = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        same_device(q, given | {"scheduler_metadata": scheduler_metadata})
        for x, (name, t) in zip((q, k, v), given.items(), strict=True):
            if x.dtype in NARROW:
                descale(t, batch_size, nheads_k, name)
        if scheduler_metadata is not None:
            _metadata(scheduler_metadata)
    if not (qv is alibi_slopes is sinks is None):
        _extras(q, v, batch_size, qv, alibi_slopes, sinks)
    if out is not None:
        _out(out, q, k, v)
    softmax(softmax_scale, window_size, attention_chunk, softcap)
    if num_splits < -1:
        raise ValueError(
            f"num_splits must be at least 0 (0: chosen for you) or -1 (no split), got {num_splits}"
        )
    return batch_size


def _no_dummy_row(seqused_k: Tensor | None, batch_size: int, name: str) -> None:
    """Servers on Ascend pad a batch with a sequence of which there may be an offset alone."""
    if seqused_k is not None and seqused_k.dim() == 1 and seqused_k.shape[0] == batch_size - 1:
        raise ValueError(
            f"{name} must have shape ({batch_size},), got ({batch_size - 1},): a dummy sequence "
            "that pads cu_seqlens_q must have a length too, 0 for none, or be cut off"
        )


def _rows(q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> tuple[int, int, int]:
    """The layout of q; returns batch_size, nheads and headdim."""
    if cu_seqlens_q is None:
        expected = ("batch_size", "seqlen_q", "nheads", "headdim")
        batch_size, _, nheads, headdim = shape(q, expected, "q", " without cu_seqlens_q")
        return batch_size, nheads, headdim
    lengths(cu_seqlens_q, "batch_size + 1", "cu_seqlens_q")
    _, nheads, headdim = shape(q, ("total_q", "nheads", "headdim"), "q", " with cu_seqlens_q")
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    return cu_seqlens_q.shape[0] - 1, nheads, headdim


def _packed_only(page_table: Tensor | None, max_seqlen_k: int | None) -> None:
    """What goes with cu_seqlens_k."""
    if page_table is not None:
        raise ValueError("page_table must be None when cu_seqlens_k is given, got a tensor")
    if max_seqlen_k is None:
        raise ValueError("max_seqlen_k must be given with cu_seqlens_k, got None")


def _refuse_heads(
    nheads: int, nheads_k: int, headdim: int, headdim_v: int, k_name: str
) -> NoReturn:
    if nheads_k == 0 or nheads % nheads_k != 0:
        raise ValueError(
            f"nheads of q must be a multiple of nheads_k of {k_name}, got {nheads} and {nheads_k}"
        )
    wrong, n = ("headdim", headdim) if not 0 < headdim <= MAX_HEADDIM else ("headdim_v", headdim_v)
    raise ValueError(f"{wrong} must be in [1, {MAX_HEADDIM}], got {n}")


def _narrow(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    """k and v that have not both q's dtype: they share a narrow one."""
    if q.dtype not in WIDE or k.dtype not in NARROW:
        instead = f", or one of {', '.join(map(str, NARROW))}" if q.dtype in WIDE else ""
        dtype(k, q.dtype, k_name, f" like q{instead}")
    dtype(v, k.dtype, v_name, " like q" if k.dtype is q.dtype else f" like {k_name}")


def descale(t: Tensor | None, batch_size: int | None, nheads_k: int, name: str) -> None:
    """Factors by sequence and KV head, where there are sequences, by KV head, or one for all."""
    if t is None:
        return
    dtype(t, torch.float32, name)
    sizes = tuple(t.shape)
    if sizes not in ((), (1,), (nheads_k,), (batch_size, nheads_k)):
        by_sequence = "" if batch_size is None else f"({batch_size}, {nheads_k}), "
        raise ValueError(
            f"{name} must have shape {by_sequence}({nheads_k},), (1,) or (), got {sizes}"
        )


def _metadata(t: Tensor) -> None:
    if t.dtype not in METADATA_DTYPES:
        raise TypeError(
            f"scheduler_metadata must have dtype torch.int32 or torch.uint8, got {t.dtype}"
        )


def _extras(
    q: Tensor,
    v: Tensor,
    batch_size: int,
    qv: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """What adds to the scores."""
    if qv is not None:
        shape(qv, (*q.shape[:-1], v.shape[-1]), "qv")
        dtype(qv, q.dtype, "qv", " like q")
    if alibi_slopes is not None:
        nheads = q.shape[-2]
        per_batch = (batch_size, nheads) if alibi_slopes.dim() == 2 else (nheads,)
        shape(alibi_slopes, per_batch, "alibi_slopes")
        dtype(alibi_slopes, torch.float32, "alibi_slopes")
    if sinks is not None:
        shape(sinks, (q.shape[-2],), "sinks")
        if not sinks.is_floating_point():
            raise TypeError(f"sinks must have a floating-point dtype, got {sinks.dtype}")
    same_device(q, {"qv": qv, "alibi_slopes": alibi_slopes, "sinks": sinks})


def _out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    shape(out, (*q.shape[:-1], v.shape[-1]), "out")
    dtype(out, torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype, "out")
    contiguous_rows(out, "out")
    same_device(q, {"out": out})
    writable(out, "out")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, out)):
        raise ValueError("out must be None where a gradient is needed, got a tensor")


def narrows(x: Tensor, cache: Tensor) -> bool:
    """Whether the cache has no room for all bits of x, which is quantised when it is written."""
    return cache.dtype in NARROW and x.dtype in WIDE


def new_dtype(x: Tensor, name: str, cache: Tensor, cache_name: str) -> None:
    """Of new keys or values."""
    if x.dtype is not cache.dtype and not narrows(x, cache):
        wide = " or be float16, bfloat16 or float32" if cache.dtype in NARROW else ""
        raise TypeError(
            f"{name} must have dtype {cache.dtype} like {cache_name}{wide}, got {x.dtype}"
        )


def scatter(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> None:
    """What kvcache_scatter_ asks of its arguments; the values of slots are the kernel's."""
    others = {"k": k, "v": v, "v_cache": v_cache, "slot_mapping": slot_mapping}
    same_device(k_cache, others | {"k_descale": k_descale, "v_descale": v_descale}, "k_cache")
    if k_cache.dtype not in (*DTYPES, *NARROW):
        names = ", ".join(str(d) for d in (*DTYPES, torch.float8_e5m2, torch.int8))
        raise TypeError(f"k_cache must have one of the dtypes {names}, got {k_cache.dtype}")
    dtype(v_cache, k_cache.dtype, "v_cache", " like k_cache")
    entries, rows, nheads_k, headdim = shape(
        k_cache, ("num_pages", "page_size", "nheads_k", "headdim"), "k_cache"
    )
    headdim_v = shape(v_cache, (entries, rows, nheads_k, "headdim_v"), "v_cache")[-1]
    if not (0 < headdim <= MAX_HEADDIM >= headdim_v > 0 and nheads_k > 0):
        _refuse_heads(nheads_k, nheads_k, headdim, headdim_v, "k_cache")
    count = shape(k, ("num_tokens", nheads_k, headdim), "k")[0]
    shape(v, (count, nheads_k, headdim_v), "v")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        new_dtype(x, name, cache, f"{name}_cache")
        contiguous_rows(cache, f"{name}_cache")
        writable(cache, f"{name}_cache")
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"slot_mapping must have dtype torch.int32 or torch.int64, got {slot_mapping.dtype}"
        )
    shape(slot_mapping, ("num_slots",), "slot_mapping")
    if slot_mapping.shape[0] > count:
        raise ValueError(
            f"slot_mapping must have at most the {count} rows of k, got {slot_mapping.shape[0]}"
        )
    descale(k_descale, None, nheads_k, "k_descale")
    descale(v_descale, None, nheads_k, "v_descale")


def append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch_size: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_seqlens: Tensor | None,
) -> None:
    """What flash_attn_with_kvcache asks of new keys and values and of their rotation."""
    if rotary_seqlens is not None:
        lengths(rotary_seqlens, batch_size, "rotary_seqlens")
        same_device(q, {"rotary_seqlens": rotary_seqlens})
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
    others = {"k": k, "v": v, "cu_seqlens_k_new": cu_seqlens_k_new}
    same_device(q, others | {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin})
    nheads_k, headdim, headdim_v = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
    if cu_seqlens_k_new is None:
        rows = (batch_size, "seqlen_new", nheads_k, headdim)
        shape(k, rows, "k", " without cu_seqlens_k_new")
        shape(v, (batch_size, k.shape[1], nheads_k, headdim_v), "v")
    else:
        lengths(cu_seqlens_k_new, batch_size + 1, "cu_seqlens_k_new")
        shape(k, ("total_k_new", nheads_k, headdim), "k", " with cu_seqlens_k_new")
        shape(v, (k.shape[0], nheads_k, headdim_v), "v")
    new_dtype(k, "k", k_cache, "k_cache")
    new_dtype(v, "v", v_cache, "v_cache")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together, got one of them")
    if rotary_cos is not None and rotary_sin is not None:
        rotary(k, "k", q, "q", rotary_cos, rotary_sin)


def rotary(
    x: Tensor, name: str, like: Tensor, like_name: str, rotary_cos: Tensor, rotary_sin: Tensor
) -> None:
    """Tables, of float32 or like what the caller calls so, and what they rotate."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names} to be rotated, got {x.dtype}")
    shape(rotary_cos, ("seqlen_ro", "rotary_dim / 2"), "rotary_cos")
    shape(rotary_sin, tuple(rotary_cos.shape), "rotary_sin")
    if rotary_cos.dtype is not torch.float32:
        dtype(rotary_cos, like.dtype, "rotary_cos", f" like {like_name}, or torch.float32")
    dtype(rotary_sin, rotary_cos.dtype, "rotary_sin", " like rotary_cos")
    if rotary_cos.shape[1] * 2 > x.shape[-1]:
        raise ValueError(
            f"rotary_dim must be at most headdim, {x.shape[-1]}, got {rotary_cos.shape[1] * 2}"
        )


def read_after_append(
    q: Tensor,
    k: Tensor,
    k_cache: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    seqused_q: Tensor | None,
    cache_start: Tensor | None,
    window_size: Sequence[int],
    attention_chunk: int,
) -> None:
    """The values that the append does not look at, and the attention only after it has written."""
    if cache_leftpad is page_table is cu_seqlens_q is seqused_q is cache_start is None:
        return
    seqlens = values(cache_seqlens)
    if seqlens is None:
        return
    offsets(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    pads, used = values(cache_leftpad), values(seqused_q)
    if pads is not None:
        for b, (pad, seqlen) in enumerate(zip(pads, seqlens, strict=True)):
            if not 0 <= pad <= seqlen:
                raise ValueError(f"cache_leftpad[{b}] must be in [0, {seqlen}], got {pad}")
    starts = values(cache_start)
    for b, start in enumerate(starts or ()):
        if start < 0:
            raise ValueError(f"cache_start[{b}] must be at least 0, got {start}")
    if used is not None:
        for b, (count, most) in enumerate(zip(used, _counts(q, cu_seqlens_q), strict=True)):
            if not 0 <= count <= most:
                raise ValueError(f"seqused_q[{b}] must be in [0, {most}], got {count}")
    num_pages, page_size = k_cache.shape[:2]
    if page_table is None or page_size == 0 or _all_pages(page_table, num_pages):
        return  # the append refuses pages of no row
    entries = values(cache_batch_idx) or range(len(seqlens))
    rows, new = used or _counts(q, cu_seqlens_q), _counts(k, cu_seqlens_k_new)
    for b, entry in enumerate(entries):
        if rows[b] == 0 or not 0 <= entry < page_table.shape[0]:
            continue
        pad = pads[b] if pads else 0
        position = seqlens[b] - pad + new[b] - rows[b]  # of the first row of q
        seen = max(0, position - window_size[0]) if window_size[0] >= 0 else 0
        if attention_chunk > 0:
            offset = (position + (starts[b] if starts else 0)) % attention_chunk
            seen = max(seen, position - offset)
        if pad + seen >= seqlens[b]:
            continue  # no row sees an old key
        first = (pad + seen) // page_size
        old = page_table[entry, first : -(-seqlens[b] // page_size)]
        for i, page in enumerate(old.tolist(), first):
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"page_table[{entry}, {i}] must be in [0, {num_pages}), got {page}"
                )


def _counts(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """How many rows of x, dense or packed, belong to each sequence."""
    seen = values(cu_seqlens)
    if seen is None:
        return [x.shape[1]] * x.shape[0]
    return [end - begin for begin, end in pairwise(seen)]


def _all_pages(page_table: Tensor, num_pages: int) -> bool:
    """Whether every entry is a page, whoever sees it: in most tables, and quickly told."""
    if page_table.numel() > 256:
        lowest, highest = map(int, page_table.aminmax())
    else:
        ids = page_table.flatten().tolist() or [0]
        lowest, highest = min(ids), max(ids)
    return lowest >= 0 and highest < num_pages


def parts(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None, name: str
) -> None:
    """What flash_attn_combine merges; `name` says where the dtype of its result comes from."""
    rows = ("total_q",) if out_partial.dim() == 4 else ("batch_size", "seqlen")
    shape(out_partial, ("num_splits", *rows, "nheads", "headdim"), "out_partial")
    shape(lse_partial, tuple(out_partial.shape[:-1]), "lse_partial")
    dtype(out_partial, torch.float32, "out_partial")
    dtype(lse_partial, torch.float32, "lse_partial")
    if out_dtype not in (None, *WIDE):
        raise TypeError(
            f"{name} must be torch.float32, torch.float16 or torch.bfloat16, got {out_dtype}"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in (*WIDE, torch.float64):
        names = ", ".join(map(str, (*WIDE, torch.float64)))
        raise TypeError(f"x must have one of the dtypes {names}, got {x.dtype}")
    strided(x, weight, bias)
    same_device(x, {"weight": weight, "bias": bias}, "x")
    if x.dim() == 0:
        raise ValueError("x must have shape (..., in_features), got ()")
    out_features = shape(weight, ("out_features", x.shape[-1]), "weight")[0]
    dtype(weight, x.dtype, "weight", " like x")
    if bias is not None:
        shape(bias, (out_features,), "bias")
        dtype(bias, x.dtype, "bias", " like x")
