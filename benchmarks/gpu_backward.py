"""The backward of causal attention on a GPU beside PyTorch's: milliseconds and TFLOP/s.

    python benchmarks/gpu_backward.py
    python benchmarks/gpu_backward.py --shapes 1x1024,8x2048 --headdim 64 --dtype float16

Calls take turns, so that what disturbs one disturbs all; medians of CUDA events are compared. A
backward counts the five products of the part that the mask leaves. PyTorch's, which is
FlashAttention-2's or cuDNN's, also copies what autograd hands it, which is little.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa3_ops  # noqa: F401  (registers the operators)

SHAPES = "16x1024,4x4096,1x16384"
ROUNDS = 15
WARM_UP = 2
CALLS = 4  # of a turn, so that the host is ahead of the device


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> Callable[[], Any]:
    out, lse = torch.ops.fa3npu.flash_attn_func(q, k, v, causal=True)
    backward = torch.ops.fa3npu.flash_attn_func_backward
    return partial(backward, dout, q, k, v, out, lse, causal=True)


def sdpa(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> Callable[[], Any]:
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return partial(torch.autograd.grad, out, leaves, dout.transpose(1, 2), retain_graph=True)


def repeatable(call: Callable[[], Any]) -> Any:
    with deterministic():
        return call()


def calls_of(
    batch: int, seqlen: int, arguments: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    dtype, d = getattr(torch, arguments.dtype), arguments.headdim
    heads = (arguments.heads, arguments.heads_k, arguments.heads_k, arguments.heads)
    inputs = [torch.randn(batch, seqlen, h, d, device="cuda", dtype=dtype) for h in heads]
    fa2 = sdpa(SDPBackend.FLASH_ATTENTION, *inputs)
    return {
        "fa3_ops": ours(*inputs),
        "FA2": fa2,
        "FA2, deterministic": partial(repeatable, fa2),
        "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, *inputs),
    }


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            if turn >= WARM_UP:
                times[name].append(begin.elapsed_time(end) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help=f"batch x rows, by default {SHAPES}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--headdim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--heads-k", type=int, default=8)
    arguments = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: causal, {arguments.dtype}, "
        f"heads {arguments.heads}, KV heads {arguments.heads_k}, headdim {arguments.headdim}\n"
    )
    table: list[tuple[str, ...]] = []
    for shape in arguments.shapes.split(","):
        batch, seqlen = map(int, shape.split("x"))
        flops = 5 * batch * arguments.heads * seqlen * seqlen * arguments.headdim
        times = milliseconds(calls_of(batch, seqlen, arguments))
        cells = (f"{ms:.3f} ms, {flops / ms / 1e9:.0f} TF" for ms in times.values())
        if not table:
            table = [("batch x rows", *times, "FA2 / fa3_ops"), ("---",) * (len(times) + 2)]
        table.append((shape, *cells, f"{times['FA2'] / times['fa3_ops']:.2f}"))
        torch.cuda.empty_cache()
    for row in table:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
