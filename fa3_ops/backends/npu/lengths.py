"""Lengths: what the host may know of them, and what has to be decided on the device.

Outside a graph capture and without scheduler_metadata the host reads the lengths, once a call: it
checks them as the CPU kernels do, and sees that most calls need nothing below. Otherwise nothing
waits for the device: lengths and page ids are bounded there, and rows without keys are cleared
there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.npu.lowering import (
    drops_hidden_pages,
    hidden_pages,
    keys_in_use,
    sequence_of_row,
)


def require(condition: bool, message: str) -> None:
    """A complaint about a value, which errors.py makes a ValueError."""
    if not condition:
        raise RuntimeError(f"fa3npu: {message}")


LENGTHS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "cache_batch_idx",
    "cache_leftpad",
    "page_table",
    "scheduler_metadata",
)


def with_contiguous_lengths(call: Attention) -> Attention:
    """The kernels read these by address alone. (The rows of a page table may lie apart: bound.)"""
    given = ((name, getattr(call, name)) for name in LENGTHS)
    strided = {name: t.contiguous() for name, t in given if t is not None and t.stride(-1) != 1}
    return replace(call, **strided) if strided else call


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
    """Checked lengths on the host, left padding passed over."""

    cu_seqlens_q: list[int] | None
    cu_seqlens_k: list[int] | None
    seqlens_q: list[int]
    seqlens_k: list[int]
    plain: bool  # every row of q counts and sees a key, and no sequence is without keys
    hidden_pages: list[int] | None
    leftpad: list[int] | None

    @staticmethod
    def of(call: Attention) -> Lengths:
        cu_q, cu_k, used_q, used_k, entries, pads, hidden = read(
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.seqused_q,
            call.seqused_k,
            call.cache_batch_idx,
            call.cache_leftpad,
            hidden_pages(call) if drops_hidden_pages(call) else None,
        )
        batch_size, rows = call.batch_size, call.q.shape[-3]
        seqlens_q = row_counts(call.q, cu_q, batch_size, "cu_seqlens_q")
        plain = cu_q is None or (cu_q[0] == 0 and cu_q[-1] == rows)
        if used_q is not None:
            for b, (used, most) in enumerate(zip(used_q, seqlens_q, strict=True)):
                require(0 <= used <= most, f"seqused_q[{b}] must be in [0, {most}], got {used}")
            plain = plain and used_q == seqlens_q
            seqlens_q = used_q

        most_k = row_counts(call.k, cu_k, batch_size, "cu_seqlens_k")
        if call.page_table is not None:
            most_k = [call.k.shape[1] * call.page_table.shape[1]] * batch_size
        seqlens_k = most_k if used_k is None else used_k
        name = "cache_seqlens" if call.is_cache else "seqused_k"
        for b, (used, most) in enumerate(zip(seqlens_k, most_k, strict=True)):
            require(0 <= used <= most, f"{name}[{b}] must be in [0, {most}], got {used}")
        if entries is not None:
            n = (call.k if call.page_table is None else call.page_table).shape[0]
            for b, entry in enumerate(entries):
                require(0 <= entry < n, f"cache_batch_idx[{b}] must be in [0, {n}), got {entry}")
        if pads is not None:
            for b, (pad, used) in enumerate(zip(pads, seqlens_k, strict=True)):
                require(0 <= pad <= used, f"cache_leftpad[{b}] must be in [0, {used}], got {pad}")
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
        plain = plain and min(seqlens_k, default=1) > 0 and (right < 0 or slack + right >= 0)
        return Lengths(cu_q, cu_k, seqlens_q, seqlens_k, plain, hidden, pads)

    def without_hidden_pages(self, page_size: int) -> Lengths:
        """As lowering.without_hidden_pages."""
        if self.hidden_pages is None:
            return self
        pads = self.leftpad or [0] * len(self.seqlens_k)
        dropped = [
            max(pages * page_size - pad, 0)
            for pages, pad in zip(self.hidden_pages, pads, strict=True)
        ]
        seqlens_k = [k - n for k, n in zip(self.seqlens_k, dropped, strict=True)]
        return replace(self, seqlens_k=seqlens_k)


def covers(call: Attention, lengths: Lengths) -> bool:
    """Whether every row of q, k and v belongs to a sequence, and every row of q sees a key."""
    cu = lengths.cu_seqlens_k
    return lengths.plain and (cu is None or (cu[0] == 0 and cu[-1] == call.k.shape[0]))


def bound(call: Attention) -> Attention:
    """Page ids within the cache, lengths within the page table, and at least one key for every
    sequence: the kernel never sees an empty one, of which it makes different kinds of wrong."""
    if call.page_table is None:
        return call
    num_pages, page_size = call.k.shape[:2]
    capacity = call.page_table.shape[1] * page_size
    return replace(
        call,
        page_table=call.page_table.clamp(0, num_pages - 1).contiguous(),
        seqused_k=keys_in_use(call).clamp(1, capacity),
    )


def blind_rows(call: Attention) -> Tensor:
    """True for the rows of q that see no key or belong to no sequence: (batch_size, seqlen_q), or
    (total_q,) for packed q. From lengths on the device, without waiting for it."""
    seqlens_k = keys_in_use(call)
    if call.cache_leftpad is not None:
        seqlens_k = seqlens_k - call.cache_leftpad
    right = call.window_size[1]
    if call.cu_seqlens_q is None:
        row = torch.arange(call.q.shape[1], dtype=torch.int32, device=call.q.device)
        seqlens_q = call.q.shape[1] if call.seqused_q is None else call.seqused_q[:, None]
        seqlens_k = seqlens_k[:, None]
        row = row.expand(call.batch_size, -1)
    else:
        cu_seqlens = call.cu_seqlens_q
        sequence = sequence_of_row(cu_seqlens, call.q)
        at = torch.arange(call.q.shape[0], dtype=torch.int32, device=call.q.device)
        row = at - cu_seqlens[sequence]
        used = cu_seqlens.diff() if call.seqused_q is None else call.seqused_q
        seqlens_q, seqlens_k = used[sequence], seqlens_k[sequence]
    blind = (row < 0) | (row >= seqlens_q) | (seqlens_k <= 0)
    if right >= 0:
        blind = blind | (row + seqlens_k - seqlens_q + right < 0)
    return blind


def clear(out: Tensor, softmax_lse: Tensor, blind: Tensor) -> None:
    """0 and -inf where blind, whatever the kernel left there."""
    out.masked_fill_(blind[..., None, None], 0)
    softmax_lse.masked_fill_(blind.unsqueeze(-2), float("-inf"))
