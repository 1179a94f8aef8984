"""Attention on a GPU beside FlashAttention-3, cuDNN and FlashAttention-2, in one run.

    python benchmarks/gpu_attention.py [--only decode] [--plots docs]

Every call is recorded in a CUDA graph; the graphs are replayed in turns, and the median of one
call's time counts. All have 32 heads, 8 KV heads, head dimension 128 and bfloat16 unless a row says
otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa3_ops

NHEADS, NHEADS_K, HEADDIM = 32, 8, 128
ROUNDS = 11
Call = Callable[[], Any]


def time_of(calls: dict[str, Call]) -> dict[str, float]:
    """Seconds a call takes, of those that run."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            repeats = max(1, min(20, int(3e-3 / max(once(call), 1e-6))))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    call()
            graphs[name] = graph, repeats
        except Exception as error:
            print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, repeats) in graphs.items():
            times[name].append(once(graph.replay) / repeats)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def once(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, and how much of it."""

    name: str
    calls: dict[str, Call]
    unit: str  # "TB/s" or "TF"
    amount: float  # bytes or operations


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype)


def decode_rows() -> Iterator[Row]:
    import fa3_fwd_interface as fa3

    sizes = [(b, 4096, 16) for b in (8, 32, 128)] + [(32, 4096, page) for page in (64, 256)]
    sizes += [(1, 32768, 16), (1, 32768, 256), (1, 4096, 16), (1, 1024, 16)]
    for batch, seqlen, page in sizes:
        pages = batch * seqlen // page
        k, v = rand(pages, page, NHEADS_K, HEADDIM), rand(pages, page, NHEADS_K, HEADDIM)
        table = torch.randperm(pages, device="cuda").int().view(batch, -1)
        lengths = torch.full((batch,), seqlen, dtype=torch.int32, device="cuda")
        q = rand(batch, 1, NHEADS, HEADDIM)
        cached = dict(cache_seqlens=lengths, page_table=table, causal=True)
        calls = {
            "ours": lambda: fa3_ops.flash_attn_with_kvcache(q, k, v, **cached),
            "FA3": lambda: fa3.flash_attn_with_kvcache(q, k, v, **cached),
        }
        yield Row(f"decode {batch}×{seqlen}, pages of {page}", calls, "TB/s", 2 * k.nbytes)
    k, v = rand(32, 4096, NHEADS_K, HEADDIM), rand(32, 4096, NHEADS_K, HEADDIM)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    q = rand(32, 1, NHEADS, HEADDIM)
    lengths = torch.full((32,), 4096, dtype=torch.int32, device="cuda")
    one = torch.ones(1, device="cuda")
    calls = {
        "ours": lambda: fa3_ops.flash_attn_with_kvcache(q, k8, v8, cache_seqlens=lengths),
        "ours, descales": lambda: fa3_ops.flash_attn_with_kvcache(
            q, k8, v8, cache_seqlens=lengths, k_descale=one, v_descale=one
        ),
        "ours, bfloat16": lambda: fa3_ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths),
    }
    yield Row("decode 32×4096, FP8 cache", calls, "TB/s", 2 * k8.nbytes)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Call:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def prefill_rows() -> Iterator[Row]:
    import fa3_fwd_interface as fa3

    shapes = [(16, 1024), (4, 4096), (1, 16384), (1, 1024), (1, 4096)]
    dims = [(NHEADS_K, 128, 128, (-1, -1))] * len(shapes)
    shapes += [(4, 4096)] * 3 + [(1, 16384)]
    dims += [
        (NHEADS_K, 64, 64, (-1, -1)),
        (NHEADS_K, 192, 128, (-1, -1)),
        (NHEADS, 128, 128, (-1, -1)),
    ]
    dims += [(NHEADS_K, 128, 128, (1023, 0))]
    for (batch, seqlen), (nheads_k, d, dv, window) in zip(shapes, dims, strict=True):
        q, k, v = (
            rand(batch, seqlen, NHEADS, d),
            rand(batch, seqlen, nheads_k, d),
            rand(batch, seqlen, nheads_k, dv),
        )
        options = dict(causal=True, window_size=window)
        calls = {
            "ours": lambda: fa3_ops.flash_attn_func(q, k, v, **options),
            "FA3": lambda: fa3.flash_attn_func(q, k, v, **options),
        }
        if window == (-1, -1):
            calls["cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)
            calls["FA2"] = sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)
        seen = seqlen * seqlen / 2 if window == (-1, -1) else seqlen * 1024
        name = f"prefill {batch}×{seqlen}"
        name += "" if d == dv == 128 else f", head dims {d}/{dv}"
        name += "" if nheads_k == NHEADS_K else ", MHA"
        name += "" if window == (-1, -1) else ", window 1024"
        yield Row(name, calls, "TF", 2 * batch * NHEADS * seen * (d + dv))
    for lengths in ([3000, 100, 2500, 700, 1800, 64, 4096, 900, 350, 2048, 128, 1200], [512] * 32):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
        q, k, v = (
            rand(sum(lengths), NHEADS, 128),
            rand(sum(lengths), NHEADS_K, 128),
            rand(sum(lengths), NHEADS_K, 128),
        )
        most = max(lengths)
        calls = {
            "ours": lambda: fa3_ops.flash_attn_varlen_func(
                q, k, v, cu, cu, most, most, causal=True
            ),
            "FA3": lambda: fa3.flash_attn_varlen_func(q, k, v, cu, cu, most, most, causal=True),
        }
        amount = sum(2 * NHEADS * n * n * 128 for n in lengths)
        yield Row(f"varlen {len(lengths)} sequences, longest {most}", calls, "TF", amount)


SECTIONS = {"decode": decode_rows, "prefill": prefill_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in arguments.only or SECTIONS:
        for row in SECTIONS[name]():
            times = time_of(row.calls)
            print(row.name)
            for peer, seconds in times.items():
                rate = row.amount / seconds / 1e12
                ratio = times.get("FA3", seconds) / seconds
                print(
                    f"    {peer}: {seconds * 1e6:.1f} us, {rate:.2f} {row.unit}, {ratio:.2f} of FA3",
                    flush=True,
                )


if __name__ == "__main__":
    main()
