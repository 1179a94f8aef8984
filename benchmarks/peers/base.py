"""What every peer has: its inputs, its caches, and the class that it derives from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from workloads import Workload

Call = Callable[[], Tensor | tuple[Tensor, ...]]
MOST_COPIES = 512  # of a decode's caches


class Unsupported(Exception):
    """The peer does not compute this; the message says why."""


@dataclass
class Inputs:
    """Tensors of a workload. In a decode the keys lie in `memory`, uint8, which holds one cache or
    more in whatever layout the peer has; k and v are what a peer must store there first, or None
    where any content will do."""

    q: Tensor  # (batch_size, seqlen_q, nheads, headdim), or (total, nheads, headdim)
    k: Tensor | None = None
    v: Tensor | None = None
    qv: Tensor | None = None
    dout: Tensor | None = None
    memory: Tensor | None = None

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        """k and v where they must be there."""
        if self.k is None or self.v is None:
            raise ValueError("k and v of this row lie in its memory alone")
        return self.k, self.v


def make_inputs(row: Workload, memory: Tensor | None = None) -> Inputs:
    """Random tensors; with `memory`, a decode's keys are whatever lies there."""
    torch.manual_seed(0)
    dtype = getattr(torch, row.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    total = sum(row.lengths)
    rows_q = (total,) if row.lengths else (row.batch_size, row.seqlen_q)
    rows_k = (total,) if row.lengths else (row.batch_size, row.seqlen_k)
    x = Inputs(q=randn(*rows_q, row.nheads, row.headdim), memory=memory)
    if row.qv:
        x.qv = randn(*rows_q, row.nheads, row.headdim_v)
    if memory is None:
        x.k = randn(*rows_k, row.nheads_k, row.headdim)
        x.v = randn(*rows_k, row.nheads_k, row.headdim_v)
        if row.kind == "decode":
            x.memory = torch.zeros(row.cache_bytes, dtype=torch.uint8)
    if row.kind == "train":
        x.dout = randn(*rows_q, row.nheads, row.headdim_v)
    return x


def copies(row: Workload, memory: Tensor) -> int:
    return min(memory.numel() // row.cache_bytes, MOST_COPIES)


def part(row: Workload, memory: Tensor, start: int, *shape: int) -> Tensor:
    """A tensor of this shape over the memory from byte `start`."""
    size = row.itemsize
    for n in shape:
        size *= n
    return memory[start : start + size].view(getattr(torch, row.dtype)).view(shape)


def dense_caches(row: Workload, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    """(k_cache, v_cache), each (batch_size, seqlen_k, nheads_k, ...), one after another."""
    assert x.memory is not None
    shape = (row.batch_size, row.seqlen_k, row.nheads_k)
    k_bytes = row.cache_bytes * row.headdim // (row.headdim + row.headdim_v)
    caches = []
    for i in range(copies(row, x.memory)):
        start = i * row.cache_bytes
        caches.append(
            (
                part(row, x.memory, start, *shape, row.headdim),
                part(row, x.memory, start + k_bytes, *shape, row.headdim_v),
            )
        )
    if x.k is not None and x.v is not None:
        caches[0][0].copy_(x.k)
        caches[0][1].copy_(x.v)
    return caches


def page_tables(row: Workload, memory: Tensor, page_size: int) -> list[Tensor]:
    """Page tables (batch_size, seqlen_k / page_size) int32 over pages in random order."""
    n, pages = copies(row, memory), row.seqlen_k // page_size
    order = torch.randperm(n * row.batch_size * pages).int()
    return list(order.view(n, row.batch_size, pages))


def paged_cache(row: Workload, x: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All the memory as k_cache and v_cache (num_pages, page_size, nheads_k, ...), and page tables
    that share no page."""
    assert x.memory is not None
    tables = page_tables(row, x.memory, row.page_size)
    pages = len(tables) * tables[0].numel()
    shape = (pages, row.page_size, row.nheads_k)
    k_cache = part(row, x.memory, 0, *shape, row.headdim)
    start = k_cache.numel() * row.itemsize
    v_cache = part(row, x.memory, start, *shape, row.headdim_v)
    if x.k is not None and x.v is not None:
        table = tables[0].flatten().long()
        k_cache[table] = x.k.view(shape[0], row.page_size, row.nheads_k, row.headdim)
        v_cache[table] = x.v.view(shape[0], row.page_size, row.nheads_k, row.headdim_v)
    return k_cache, v_cache, tables


def latent_caches(row: Workload, x: Inputs) -> list[Tensor]:
    """MLA's cache as one tensor, (batch_size, seqlen_k, 1, headdim_v + headdim), v first."""
    assert x.memory is not None
    shape = (row.batch_size, row.seqlen_k, row.nheads_k, row.headdim_v + row.headdim)
    caches = [
        part(row, x.memory, i * row.cache_bytes, *shape) for i in range(copies(row, x.memory))
    ]
    if x.k is not None and x.v is not None:
        caches[0].copy_(torch.cat([x.v, x.k], -1))
    return caches


def cu_seqlens(row: Workload) -> Tensor:
    return torch.tensor([0, *row.lengths]).cumsum(0).int()


def window_size(row: Workload) -> tuple[int, int]:
    """In FlashAttention-3's terms: (left, right), both inclusive, the row itself not counted."""
    return (row.window - 1, 0) if row.window else (-1, -1)


def training(x: Inputs, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """Forward and backward: the output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = attention(leaves[0], leaves[1], leaves[2])
            return out.detach(), *torch.autograd.grad(out, leaves, x.dout)

    return call


class Peer:
    """Methods decode, prefill, varlen and train give the calls; a missing one is not computed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def forms(self, row: Workload) -> tuple[str, ...]:
        """Ways to compute it; raises Unsupported."""
        return ("",)

    def calls(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        make = getattr(self, row.kind, None)
        if make is None:
            raise Unsupported(f"has no {row.kind}")
        result: list[Call] = make(row, form, x)
        return result
