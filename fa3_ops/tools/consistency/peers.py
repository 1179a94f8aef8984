"""FlashAttention-3 itself beside the contract: how many elements of a row have other bits than the
same row in other company."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import fa3_ops
from fa3_ops.tools.consistency.outcome import Difference

PEER = "flash_attn_3"


@dataclass(frozen=True)
class Sizes:
    """Of the measured calls, in bfloat16, whose heads are those of an 8-billion model."""

    nheads: int = 32
    nheads_k: int = 8
    headdim: int = 128
    batch_size: int = 8
    seqlen: int = 4096
    longest: int = 32768
    repeats: int = 30


def is_there(device: str) -> bool:
    """Whether the peer serves calls here."""
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=device)
    try:
        with fa3_ops.use_backend(PEER):
            fa3_ops.explain(fa3_ops.flash_attn_func, q, q, q)
    except (NotImplementedError, ValueError):  # it refuses, or is none of this device's
        return False
    return True


def figures(device: str, sizes: Sizes | None = None) -> str:
    """Markdown."""
    sizes = sizes or Sizes()
    with fa3_ops.use_backend(PEER):
        rows = [(what, share(pairs)) for what, pairs in comparisons(device, sizes)]
        times = [decoding_time(device, sizes, num_splits) for num_splits in (0, 1)]
    table = tabulate(rows, (PEER, "elements that differ"), tablefmt="github")
    return (
        f"{table}\n\nA decode over {sizes.longest} keys takes {times[1] / times[0]:.1f} times as "
        f"long with num_splits=1: {times[1] * 1e6:.0f} µs, by default {times[0] * 1e6:.0f} µs."
    )


def share(pairs: Iterator[tuple[Tensor, Tensor]]) -> str:
    difference = Difference()
    for wanted, got in pairs:
        difference.count(wanted, got)
    return f"{difference.differing / difference.elements:.1%}"


def comparisons(device: str, sizes: Sizes) -> Iterator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]:
    for num_splits in (0, 1):
        what = f"decode alone and in a batch, num_splits={num_splits}"
        yield what, alone_and_together(device, sizes, num_splits)
    yield "last row of a prefill, and alone", last_row(device, sizes)


def rand(device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).to(device)


def decode(
    device: str, sizes: Sizes, batch_size: int, seqlen: int, num_splits: int
) -> Callable[[slice], Tensor]:
    """A decode of a part of a batch, over a dense cache, which every build reads."""
    q = rand(device, batch_size, 1, sizes.nheads, sizes.headdim)
    k, v = rand(device, 2, batch_size, seqlen, sizes.nheads_k, sizes.headdim).unbind()
    lengths = torch.full((batch_size,), seqlen, dtype=torch.int32, device=device)

    def part(rows: slice) -> Tensor:
        result: Any = fa3_ops.flash_attn_with_kvcache(
            *(q[rows], k[rows], v[rows]), cache_seqlens=lengths[rows], num_splits=num_splits
        )
        assert isinstance(result, Tensor)
        return result

    return part


def alone_and_together(
    device: str, sizes: Sizes, num_splits: int
) -> Iterator[tuple[Tensor, Tensor]]:
    step = decode(device, sizes, sizes.batch_size, sizes.seqlen, num_splits)
    together = step(slice(None))
    for b in range(sizes.batch_size):
        yield together[b : b + 1], step(slice(b, b + 1))


def last_row(device: str, sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    q = rand(device, 1, sizes.seqlen, sizes.nheads, sizes.headdim)
    k, v = rand(device, 2, 1, sizes.seqlen, sizes.nheads_k, sizes.headdim).unbind()
    whole = fa3_ops.flash_attn_func(q, k, v, causal=True)
    alone = fa3_ops.flash_attn_func(q[:, -1:], k, v, causal=True)
    assert isinstance(whole, Tensor)
    assert isinstance(alone, Tensor)
    yield whole[:, -1:], alone


def decoding_time(device: str, sizes: Sizes, num_splits: int) -> float:
    """Seconds that a decode over the longest cache takes, with the host's part."""
    step = decode(device, sizes, 1, sizes.longest, num_splits)
    module = torch.get_device_module(device)
    taken = []
    for _ in range(sizes.repeats):
        module.synchronize()
        start = time.perf_counter()
        step(slice(None))
        module.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken)
