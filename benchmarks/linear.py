"""fa3_ops.linear beside torch.nn.functional.linear: how many times as fast.

    python benchmarks/linear.py                       1 thread and 2, all dtypes
    python benchmarks/linear.py --threads 1 --dtypes float32 --rows 1,512 --sizes 1024x1024

Different weights come one after another, as those of a model's layers do, which together do not fit
into the last-level cache. Both functions take turns, so that neighbours on the machine disturb them
alike; medians of several turns are compared, CPU time for one thread and wall time for more
(docs/cpu_performance.md).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import limits
import torch
import torch.nn.functional as F
import worker

import fa3_ops

FUNCTIONS = (fa3_ops.linear, F.linear)
TURNS = 5
PATIENCE = 10.0  # seconds of a cell, after which its turns are enough


def calls_of(
    dtype: torch.dtype, rows: int, size: tuple[int, int]
) -> list[list[Callable[[], object]]]:
    """Of both functions, one call for each weight."""
    in_features, out_features = size
    x = torch.randn(rows, in_features).to(dtype)
    one = torch.randn(out_features, in_features).to(dtype)
    count = max(2, -(-2 * limits.l3_bytes() // (one.numel() * one.itemsize)))
    weights = [one.clone() for _ in range(count)]
    return [[partial(function, x, weight) for weight in weights] for function in FUNCTIONS]


def cell(dtype: torch.dtype, rows: int, size: tuple[int, int], threads: int) -> str:
    """Our speed as a multiple of PyTorch's, and our operations a second and bytes of weight."""
    timers = [worker.Timer(some, threads) for some in calls_of(dtype, rows, size)]
    seconds: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for timer, times in zip(timers, seconds, strict=True):
            times.append(timer.sample().seconds)
        if sum(map(sum, seconds)) * 3 > PATIENCE:
            break
    ours, pytorchs = map(statistics.median, seconds)
    elements = size[0] * size[1]
    rate = f"{2 * rows * elements / ours / 1e9:.0f} GFLOP/s"
    if rows <= 4:
        rate = f"{elements * dtype.itemsize / ours / 1e9:.1f} GB/s"
    return f"{pytorchs / ours:.2f} ({rate})"


def listed(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def sizes(text: str) -> list[tuple[int, int]]:
    pairs = (size.split("x") for size in text.split(","))
    return [(int(in_features), int(out_features)) for in_features, out_features in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=listed, default=[1, 2])
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--rows", type=listed, default=[1, 4, 64, 512])
    parser.add_argument("--sizes", type=sizes, default=sizes("1024x1024,4096x1024,4096x4096"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"\n{torch.ops.fa3npu.cpu_capability()}, threads: {threads}\n")
        names = " | ".join(f"{n} rows" for n in arguments.rows)
        print(f"| in x out | {names} |\n|{'---|' * (1 + len(arguments.rows))}", flush=True)
        for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
            for size in arguments.sizes:
                cells = (cell(dtype, rows, size, threads) for rows in arguments.rows)
                label = f"{size[0]} x {size[1]}, {dtype}".replace("torch.", "")
                print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
