"""The same rows in another batch, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import fa3_ops
from fa3_ops.tools.consistency.case import Case, Pair


def repeated(case: Case) -> Iterator[Pair]:
    for b in range(case.batch_size):
        out, softmax_lse = case.alone(b)
        yield from case.same(b, out[0], softmax_lse[0])


def any_batch(case: Case) -> Iterator[Pair]:
    everyone = list(range(case.batch_size))
    for sequences in ([0], everyone, everyone[::-1], [1, 0, 0]):
        yield from case.varlen(sequences)


def dense_batch(case: Case) -> Iterator[Pair]:
    """Equal lengths as one dense batch, and unequal ones as a padded batch."""
    n = min(case.seqlens[0], case.seqlens[-1])
    long, short = (0, -1) if case.seqlens[0] >= case.seqlens[-1] else (-1, 0)
    q, k, v = (torch.stack((x[long][:n], x[short][:n])) for x in (case.q, case.k, case.v))
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_func, q, k, v, **case.options, return_attn_probs=True
    )
    for row, b in enumerate((long, short)):
        yield from case.same(b, out[row], softmax_lse[row])
    seqlens = case.ints(case.seqlens)
    q, k, v = (case.padded(x) for x in (case.q, case.k, case.v))
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_varlen_func,
        *(q, k, v, None, None, None, None, seqlens, seqlens),
        **case.options,
        return_attn_probs=True,
    )
    for b, n in enumerate(case.seqlens):
        yield from case.same(b, out[b, :n], softmax_lse[b, :, :n])


def longer_maximum(case: Case) -> Iterator[Pair]:
    yield from case.varlen(range(case.batch_size), slack=1000)


def gradients(case: Case, sequences: Sequence[int]) -> list[Tensor]:
    """dq, dk and dv of flash_attn_varlen_func, packed."""
    lengths = [case.seqlens[b] for b in sequences]
    cu_seqlens = case.cumulative(lengths)
    q, k, v, dout = (
        torch.cat([x[b] for b in sequences]) for x in (case.q, case.k, case.v, case.dout)
    )
    lengths_given = (cu_seqlens, cu_seqlens, max(lengths), max(lengths), None, None)
    scale = case.setting.headdim**-0.5
    out, softmax_lse = fa3_ops.flash_attn_varlen_func(
        *(q, k, v, *lengths_given, scale), **case.options, return_attn_probs=True
    )
    arguments = (
        *(dout, q, k, v, out, softmax_lse, *lengths_given, scale),
        *(True, case.setting.window_size, 0, case.setting.softcap),
        True,  # deterministic
    )
    results: tuple[Tensor, ...] = case.call(
        torch.ops.fa3npu.flash_attn_varlen_func_backward, *arguments
    )
    return list(results)


def backward(case: Case) -> Iterator[Pair]:
    """Gradients again, and of each sequence alone."""
    everyone = list(range(case.batch_size))
    together = gradients(case, everyone)
    yield from zip(together, gradients(case, everyone), strict=True)
    parts = [x.split(case.seqlens) for x in together]
    for b in everyone:
        for part, x in zip(parts, gradients(case, [b]), strict=True):
            yield part[b], x
