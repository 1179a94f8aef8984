"""Lengths on the host, which waits for the device to read them: once a call, where a backend wants
them. It checks them as the CPU kernels do, and sees that most calls need nothing of what else would
be decided on the device: no bounds, and no rows that see no key.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention, Gradient, Request
from fa3_ops.backends.lowering.keys import drops_hidden_pages, hidden_pages


def require(condition: bool, message: str) -> None:
    """A complaint about a value, which errors.py makes a ValueError."""
    if not condition:
        raise RuntimeError(f"fa3npu: {message}")


def read(*tensors: Tensor | None) -> list[list[int] | None]:
    """The values of int32 vectors, all in one wait for the device."""
    given = [t for t in tensors if t is not None]
    values = (given[0] if len(given) == 1 else torch.cat(given)).tolist() if given else []
    lists: list[list[int] | None] = []
    at = 0
    for t in tensors:
        lists.append(None if t is None else values[at : at + len(t)])
        at += 0 if t is None else len(t)
    return lists


def check_segments(cu_seqlens: list[int], total: int, name: str) -> None:
    for b, (begin, end) in enumerate(pairwise(cu_seqlens)):
        require(begin >= 0, f"{name}[{b}] must not be negative, got {begin}")
        require(begin <= end, f"{name} must not fall, got {begin} followed by {end} at index {b}")
        require(
            end <= total,
            f"{name}[{b + 1}] must be at most the {total} rows of its tensor, got {end}",
        )


def row_counts(x: Tensor, cu_seqlens: list[int] | None, batch_size: int, name: str) -> list[int]:
    """How many rows of x, dense or packed, belong to each sequence."""
    if cu_seqlens is None:
        return [x.shape[1]] * batch_size
    check_segments(cu_seqlens, x.shape[0], name)
    return [end - begin for begin, end in pairwise(cu_seqlens)]


@dataclass(frozen=True)
class Lengths:
    """Checked lengths on the host, left padding and hidden pages passed over."""

    cu_seqlens_q: list[int] | None
    cu_seqlens_k: list[int] | None
    seqlens_q: list[int]
    seqlens_k: list[int]
    plain: bool  # every row of q counts and sees a key, and no sequence is without keys

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(rows of q, keys) of every sequence."""
        return list(zip(self.seqlens_q, self.seqlens_k, strict=True))

    def covers(self, call: Attention) -> bool:
        """Whether every row of q, k and v belongs to a sequence, and every row of q sees a key."""
        cu = self.cu_seqlens_k
        return self.plain and (cu is None or (cu[0] == 0 and cu[-1] == call.k.shape[0]))

    @staticmethod
    def of(request: Request) -> Lengths | None:
        """None of a request that has none."""
        if isinstance(request, Gradient):
            request = request.call
        return _checked(request) if isinstance(request, Attention) else None


def _checked(call: Attention) -> Lengths:
    cu_q, cu_k, used_q, used_k, entries, pads, hidden = read(
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.seqused_q,
        call.seqused_k,
        call.cache_batch_idx,
        call.cache_leftpad,
        hidden_pages(call) if drops_hidden_pages(call) else None,
    )
    rows_q = row_counts(call.q, cu_q, call.batch_size, "cu_seqlens_q")
    seqlens_q = rows_q if used_q is None else used_q
    _check_within("seqused_q", seqlens_q, rows_q)
    seqlens_k = _seqlens_k(call, cu_k, used_k)
    _check_entries(call, entries)
    if pads is not None:
        _check_within("cache_leftpad", pads, seqlens_k)
        seqlens_k = [used - pad for used, pad in zip(seqlens_k, pads, strict=True)]
    for name, packed, seqlens, bound in (
        ("max_seqlen_q", cu_q, seqlens_q, call.max_seqlen_q),
        ("max_seqlen_k", cu_k, seqlens_k, call.max_seqlen_k),
    ):
        longest = max(seqlens, default=0)
        require(
            packed is None or bound is None or longest <= bound,
            f"{name} must be at least the longest sequence, {longest}, got {bound}",
        )
    right = call.window_size[1]
    slack = min((k - q for q, k in zip(seqlens_q, seqlens_k, strict=True)), default=0)
    plain = (
        (cu_q is None or (cu_q[0] == 0 and cu_q[-1] == call.q.shape[0]))
        and seqlens_q == rows_q
        and min(seqlens_k, default=1) > 0
        and (right < 0 or slack + right >= 0)
    )
    if hidden is not None:  # as lowering.keys.without_hidden_pages
        starts = zip(hidden, pads or [0] * len(hidden), strict=True)
        dropped = [max(pages * call.k.shape[1] - pad, 0) for pages, pad in starts]
        seqlens_k = [k - n for k, n in zip(seqlens_k, dropped, strict=True)]
    return Lengths(cu_q, cu_k, seqlens_q, seqlens_k, plain)


def _check_within(name: str, lengths: list[int], most: list[int]) -> None:
    for b, (length, bound) in enumerate(zip(lengths, most, strict=True)):
        require(0 <= length <= bound, f"{name}[{b}] must be in [0, {bound}], got {length}")


def _seqlens_k(call: Attention, cu: list[int] | None, used: list[int] | None) -> list[int]:
    most = row_counts(call.k, cu, call.batch_size, "cu_seqlens_k")
    if call.page_table is not None:
        most = [call.k.shape[1] * call.page_table.shape[1]] * call.batch_size
    if used is None:
        return most
    _check_within("cache_seqlens" if call.is_cache else "seqused_k", used, most)
    return used


def _check_entries(call: Attention, entries: list[int] | None) -> None:
    n = (call.k if call.page_table is None else call.page_table).shape[0]
    for b, entry in enumerate(entries or ()):
        require(0 <= entry < n, f"cache_batch_idx[{b}] must be in [0, {n}), got {entry}")
