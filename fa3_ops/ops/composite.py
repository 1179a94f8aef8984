"""flash_attn_with_kvcache: append, rotate, attend.

The body is Python (CompositeImplicitAutograd), so that symbolic sizes pass through it. Under a
compiler it is gone after decomposition: what is left is one operator that writes the cache and one
pure operator that reads it, whose order the schemas declare.
"""

from __future__ import annotations

import functools
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fa3_ops.backends import devices
from fa3_ops.backends.repeated import Kept, Repeated, key_of, noting
from fa3_ops.ops import checks, direct
from fa3_ops.ops.autograd import refuse_forward_mode, requires_grad, severed
from fa3_ops.ops.errors import as_value_errors
from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import every, signature
from fa3_ops.ops.writes import refuse_derivatives

ops = torch.ops.fa3npu


def _append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_q: Tensor | None = None,
    cache_start: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks, appends, rotates; returns the arguments of flash_attn_kvcache: positional and without
    starred parts, because to bind so many by name would take a tenth of the shortest call."""
    batch_size = checks.attention(
        q,
        k_cache,
        v_cache,
        k_name="k_cache",
        v_name="v_cache",
        seqused_k_name="cache_seqlens",
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        seqused_q=seqused_q,
        seqused_k=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cache_start=cache_start,
        page_table=page_table,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        out=out,
        scheduler_metadata=scheduler_metadata,
    )
    checks.append(
        q, k_cache, v_cache, k, v, batch_size, rotary_cos, rotary_sin, cache_seqlens,
        cu_seqlens_k_new, rotary_seqlens,
    )  # fmt: skip
    if k is not None and cache_seqlens is not None:
        # What the append does not take and the attention would refuse after it.
        checks.ints64(
            window_size=window_size, max_seqlen_q=max_seqlen_q, attention_chunk=attention_chunk,
            num_splits=num_splits, sm_margin=sm_margin,
        )  # fmt: skip
        checks.strided(
            *(q, qv, cache_leftpad, cu_seqlens_q, seqused_q, q_descale, k_descale, v_descale),
            *(scheduler_metadata, alibi_slopes, sinks, cache_start, out),
        )
        checks.read_after_append(
            *(q, k, k_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table),
            *(cu_seqlens_q, cu_seqlens_k_new, seqused_q, cache_start, window_size, attention_chunk),
        )
        advance = causal or max(window_size) >= 0 or attention_chunk > 0
        q, cache_seqlens = _write(
            *(q, k, v, k_cache, v_cache, cache_seqlens, cache_batch_idx, page_table, cu_seqlens_q),
            *(cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
            *(cache_start, k_descale, v_descale, advance),
        )
    return (
        q, k_cache, v_cache, qv, cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
        cu_seqlens_q, max_seqlen_q, seqused_q, q_descale, k_descale, v_descale, softmax_scale,
        causal, window_size, attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa,
        sm_margin, alibi_slopes, sinks, cache_start,
    )  # fmt: skip


def _write(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    cache_start: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    advance: bool,
) -> tuple[Tensor, Tensor]:
    """Appends k and v; returns q rotated and the lengths afterwards. Without `advance`, as it is
    without a causal or local mask, all rows of q count as the first new position."""
    if requires_grad(k, v, rotary_cos, rotary_sin):
        q, k, v, rotary_cos, rotary_sin = severed(
            "flash_attn_with_kvcache", q, k, v, rotary_cos, rotary_sin
        )
    if rotary_cos is not None:
        if rotary_seqlens is None and cache_start is not None:
            rotary_seqlens = cache_seqlens + cache_start
        tables = (
            rotary_cos,
            rotary_sin,
            cache_seqlens if rotary_seqlens is None else rotary_seqlens,
        )
        q = ops.apply_rotary(q, *tables, cu_seqlens_q, rotary_interleaved, advance)
        if not devices.of(q.device).append_rotates:
            k = ops.apply_rotary(k, *tables, cu_seqlens_k_new, rotary_interleaved)
            rotary_cos = rotary_sin = rotary_seqlens = None
    ops.kvcache_append_(
        *(k, v, k_cache, v_cache, cache_seqlens, cache_batch_idx, page_table),
        *(cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
        *(k_descale, v_descale),
    )
    new = k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff()
    return q, cache_seqlens + new


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out, softmax_lse = ops.flash_attn_kvcache.default(*_append(*args, **kwargs))
    return out, softmax_lse


def flash_attn_with_kvcache_out(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
    arguments = _append(*args, **(kwargs | {"out": out}))
    softmax_lse: Tensor = ops.flash_attn_kvcache.out(*arguments, out=out)
    return softmax_lse


class _Steps:
    """The operators of calls like an earlier one, for which nothing is checked again, and which
    PyTorch's dispatcher does not see."""

    def __init__(self, served: list[Any], arguments: tuple[Any, ...]) -> None:
        at = {name: i for i, name in enumerate(signature(_op()).names)}
        self.q, self.k, self.lengths = at["q"], at["k"], at["cache_seqlens"]
        self.cu_seqlens = at["cu_seqlens_k_new"]
        first = "cache_seqlens" if arguments[at["rotary_seqlens"]] is None else "rotary_seqlens"
        of_q = {"x": self.q, "rotary_seqlens": at[first], "cu_seqlens": at["cu_seqlens_q"]}
        *writes, attend = served
        self.attend = attend.among(at)
        self.append = writes.pop().among(at) if writes else None
        self.rotate = writes.pop().among(at | of_q) if writes else None

    def __call__(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        values = list(arguments)
        if self.append is not None:
            if self.rotate is not None:
                values[self.q] = self.rotate(values)
            self.append(values)
            cu_seqlens = values[self.cu_seqlens]
            new = values[self.k].shape[1] if cu_seqlens is None else cu_seqlens.diff()
            values[self.lengths] = values[self.lengths] + new
        out, softmax_lse = self.attend(values)
        return out, softmax_lse


def _op() -> Any:
    return ops.flash_attn_with_kvcache.default


def _knows_all(seen: list[Repeated | None], arguments: tuple[Any, ...]) -> bool:
    """Whether _Steps would do all that was done for the arguments: somebody else's kernel is not
    seen."""
    given = dict(zip(signature(_op()).names, arguments, strict=True))
    appends, rotates = given["k"] is not None, given["rotary_cos"] is not None
    positions = rotates and given["rotary_seqlens"] is None and given["cache_start"] is not None
    negated = any(isinstance(x, Tensor) and x.is_neg() for x in arguments)
    return None not in seen and len(seen) == 1 + appends + rotates and not (positions or negated)


_kept: Kept[_Steps] = Kept()


# What a call without new keys leaves None, and how it would rotate them.
APPENDED = ("k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_k_new", "rotary_seqlens")
NOTHING = (*(type(None),) * len(APPENDED), bool)


@functools.cache
def _parts() -> tuple[Any, Any]:
    """Of every argument: what an append gets alone, and the arguments of flash_attn_kvcache."""
    names, reads = signature(_op()).names, signature(ops.flash_attn_kvcache.default).names
    appended = (*APPENDED, "rotary_interleaved")
    return itemgetter(*map(names.index, appended)), itemgetter(*map(names.index, reads))


def directly(arguments: tuple[Any, ...], out: Tensor | None = None) -> Any:
    """flash_attn_with_kvcache of every argument, or None where others than kernels see the call."""
    if torch.compiler.is_compiling():
        return None
    overload = "default" if out is None else "out"
    appended, read = _parts()
    if tuple(map(type, appended(arguments))) != NOTHING:
        op = getattr(ops.flash_attn_with_kvcache, overload)
        if direct.plain(op, arguments, out) is None:
            return None
    else:
        reads = read(arguments)
        found = direct.plain(getattr(ops.flash_attn_kvcache, overload), reads, out)
        if found is None:
            return None
        k_cache, v_cache = reads[1:3]  # of any strides to that kernel, which would copy them
        nested = k_cache.is_nested or v_cache.is_nested  # without strides
        if not nested and k_cache.stride()[-1:] == v_cache.stride()[-1:] == (1,):
            results = direct.unchecked(*found, reads, out)
            if results is not NotImplemented:
                return results
    return direct.take(repeating if out is None else flash_attn_with_kvcache_out, arguments, out)


def repeating(*arguments: Any) -> tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache where nobody but kernels sees the call."""
    if not devices.of(arguments[0].device).repeats:
        return flash_attn_with_kvcache(*arguments)
    try:
        key = key_of(arguments)
    except RuntimeError:  # a tensor without strides, which is refused
        return flash_attn_with_kvcache(*arguments)
    steps = _kept.get(key)
    if steps is not None:
        if profiler._is_profiler_enabled:  # nobody else tells it whose kernels they are
            with profiler.record_function(_op().name()):
                return steps(arguments)
        return steps(arguments)
    with noting() as seen:
        results = flash_attn_with_kvcache(*arguments)
    if _knows_all(seen, arguments):
        _kept.keep(key, _Steps(seen, arguments))
    return results


def _watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if forward_ad._current_level >= 0:
        refuse_forward_mode("flash_attn_with_kvcache", (*args, *kwargs.values()))
    results = None if kwargs else directly(every(_op(), args))
    return flash_attn_with_kvcache(*args, **kwargs) if results is None else results


def _watched_out(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
    if out is None:  # PyTorch lets it through as a tensor
        raise TypeError("out must be a tensor, got None")
    refuse_derivatives(ops.flash_attn_with_kvcache.out, args, kwargs | {"out": out})
    return flash_attn_with_kvcache_out(*args, out=out, **kwargs)


def register() -> None:
    for op, body in (
        (ops.flash_attn_with_kvcache.default, _watched),
        (ops.flash_attn_with_kvcache.out, _watched_out),
    ):
        for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition", "Negative"):
            implement(op, as_value_errors(body), key)
