"""Decode over narrow caches beside a bfloat16 one: keys a second, and what FP8 and int8 gain.

    python benchmarks/narrow_cache.py                       1 thread, and as many as there are cores
    python benchmarks/narrow_cache.py --threads 1,8 --q float16

A step has one row of q a sequence, 32 heads over 8 KV heads of 128, and walks through different
caches that do not fit into the last-level cache together. The four dtypes of a row take turns, so
that neighbours on the machine disturb all of them alike; the median of several turns is printed,
CPU time for one thread and wall time for more (docs/cpu_performance.md).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable

import limits
import torch
import worker
from torch import Tensor

import fa3_ops

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
NHEADS, NHEADS_K, D = 32, 8, 128
SHAPES = ((1, 4096, 0), (8, 4096, 0), (8, 4096, 16), (32, 1024, 128))  # batch, keys, page size
TURNS = 7


def cold_bytes() -> int:
    return min(max(4 * limits.l3_bytes(), 512 << 20), 2048 << 20)


def calls_of(
    dtype: torch.dtype, q_dtype: torch.dtype, batch: int, seqlen: int, page_size: int
) -> list[Callable[[], object]]:
    """A decode step of each of so many caches that they are cold when their turn comes again."""
    generator = torch.Generator().manual_seed(0)
    step = 2 * batch * seqlen * NHEADS_K * D * dtype.itemsize
    count = max(2, -(-cold_bytes() // step))
    rows = (batch * seqlen // page_size, page_size) if page_size else (batch, seqlen)
    one = torch.randn(*rows, NHEADS_K, D, generator=generator)
    block = (one * 32 if dtype == torch.int8 else one).clamp(-127, 127).to(dtype)
    descale = torch.full((batch, NHEADS_K), 1 / 32 if dtype == torch.int8 else 1.0)
    q = torch.randn(batch, 1, NHEADS, D, generator=generator).to(q_dtype)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32)
    table = None
    if page_size:
        table = torch.randperm(rows[0], generator=generator).int().view(batch, -1)

    def call(k_cache: Tensor, v_cache: Tensor) -> object:
        return fa3_ops.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=lengths,
            page_table=table,
            k_descale=descale,
            v_descale=descale,
            causal=True,
        )

    caches = [(block.clone(), block.clone()) for _ in range(count)]
    return [lambda pair=pair: call(*pair) for pair in caches]  # type: ignore[misc]


def row(q_dtype: torch.dtype, batch: int, seqlen: int, page_size: int, threads: int) -> str:
    """Of one shape, all dtypes in turns."""
    dtypes = (q_dtype, *NARROW)
    timers = {
        dtype: worker.Timer(calls_of(dtype, q_dtype, batch, seqlen, page_size), threads)
        for dtype in dtypes
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    for _, (dtype, timer) in itertools.product(range(TURNS), timers.items()):
        seconds[dtype].append(timer.sample().seconds)
    rate = {d: batch * seqlen / statistics.median(s) / 1e6 for d, s in seconds.items()}
    wide = rate[dtypes[0]]
    bandwidth = wide * 1e6 * 2 * NHEADS_K * D * q_dtype.itemsize / 1e9
    layout = f"pages of {page_size}" if page_size else "dense"
    columns = " | ".join(f"{rate[d]:.2f} ({rate[d] / wide:.2f}x)" for d in dtypes[1:])
    return f"| {batch} x {seqlen}, {layout} | {wide:.2f} ({bandwidth:.1f} GB/s) | {columns} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", help="as 1,8; default: 1 and every core")
    parser.add_argument("--q", choices=["bfloat16", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = [int(n) for n in (arguments.threads or f"1,{cores}").split(",")]
    q_dtype = getattr(torch, arguments.q)
    names = [str(d).removeprefix("torch.") for d in (q_dtype, *NARROW)]
    for threads in dict.fromkeys(counts):
        torch.set_num_threads(threads)
        capability = torch.ops.fa3npu.cpu_capability()
        print(f"\nq {arguments.q}, {capability}, {threads} threads; million keys a second\n")
        print(f"| decode | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}", flush=True)
        for shape in SHAPES:
            print(row(q_dtype, *shape, threads), flush=True)


if __name__ == "__main__":
    main()
