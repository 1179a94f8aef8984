"""Attention on a GPU beside FlashAttention-3, cuDNN and FlashAttention-2, in one run.

    python benchmarks/gpu_attention.py [--only decode] [--vllm-fa3 _vllm_fa3_C.abi3.so]
        [--json build/gpu.json]

`gpu_report.py` makes a table and pictures of the JSON.

Every call is recorded in a CUDA graph; the graphs are replayed in turns, and the median of one
call's time counts. All have 32 heads, 8 KV heads, head dimension 128 and bfloat16 unless a row says
otherwise. FlashAttention-3 is fa3-fwd's, which has no pages and no windows; for those the library
inside a CUDA wheel of vLLM (vllm/vllm_flash_attn) can be named.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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


def vllm_fa3(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, window: tuple[int, int]
) -> Any:
    """A decode of one row a sequence by vLLM's build of FlashAttention-3."""
    cu_seqlens = torch.arange(len(q) + 1, dtype=torch.int32, device="cuda")
    most = table.shape[1] * k.shape[1]
    rest = (*window, 0.0, True, None, 0, None, 0, None, 1, 0, None)
    return partial(
        torch.ops._vllm_fa3_C.fwd,
        *(q[:, 0], k, v, None, None, None, None, cu_seqlens, None, None, None, lengths),
        *(1, most, table, *[None] * 8, HEADDIM**-0.5, True, *rest),
    )


def paged_decode(batch: int, seqlen: int, page: int) -> Row:
    pages = batch * seqlen // page
    k, v = rand(pages, page, NHEADS_K, HEADDIM), rand(pages, page, NHEADS_K, HEADDIM)
    table = torch.randperm(pages, device="cuda").int().view(batch, -1)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device="cuda")
    q = rand(batch, 1, NHEADS, HEADDIM)
    cached = {"cache_seqlens": lengths, "page_table": table, "causal": True}
    calls = {"ours": partial(fa3_ops.flash_attn_with_kvcache, q, k, v, **cached)}
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        calls["FA3"] = vllm_fa3(q, k, v, lengths, table, (-1, -1))
    return Row(f"decode {batch} x {seqlen}, pages of {page}", calls, "TB/s", 2 * k.nbytes)


def decode_rows() -> Iterator[Row]:
    for batch in (8, 32, 128):
        yield paged_decode(batch, 4096, 16)
    for batch, seqlen, page in ((32, 4096, 64), (32, 4096, 256), (1, 32768, 16), (1, 32768, 256)):
        yield paged_decode(batch, seqlen, page)
    for seqlen in (4096, 1024):
        yield paged_decode(1, seqlen, 16)
    k, v, q = (rand(32, n, h, HEADDIM) for n, h in ((4096, 8), (4096, 8), (1, NHEADS)))
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    lengths = torch.full((32,), 4096, dtype=torch.int32, device="cuda")
    one = torch.ones(1, device="cuda")
    decode = partial(fa3_ops.flash_attn_with_kvcache, q, cache_seqlens=lengths)
    calls = {
        "ours": partial(decode, k_cache=k8, v_cache=v8),
        "ours, descales": partial(decode, k_cache=k8, v_cache=v8, k_descale=one, v_descale=one),
        "ours, bfloat16": partial(decode, k_cache=k, v_cache=v),
    }
    yield Row("decode 32 x 4096, FP8 cache", calls, "TB/s", 2 * k8.nbytes)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Any:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense(
    batch: int,
    seqlen: int,
    nheads_k: int = NHEADS_K,
    dims: tuple[int, int] = (HEADDIM, HEADDIM),
    window: tuple[int, int] = (-1, -1),
) -> Row:
    import fa3_fwd_interface as fa3

    d, dv = dims
    sizes = ((NHEADS, d), (nheads_k, d), (nheads_k, dv))
    q, k, v = (rand(batch, seqlen, heads, width) for heads, width in sizes)
    calls = {
        "ours": partial(fa3_ops.flash_attn_func, q, k, v, causal=True, window_size=window),
        "FA3": partial(fa3.flash_attn_func, q, k, v, causal=True, window_size=window),
    }
    seen = seqlen * seqlen / 2
    name = f"prefill {batch} x {seqlen}"
    if window == (-1, -1):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        calls["cuDNN"] = partial(sdpa, SDPBackend.CUDNN_ATTENTION, *heads_first)
        calls["FA2"] = partial(sdpa, SDPBackend.FLASH_ATTENTION, *heads_first)
    else:
        seen, name = seqlen * (window[0] + 1), f"{name}, window {window[0] + 1}"
    name += "" if dims == (HEADDIM, HEADDIM) else f", head dims {d}/{dv}"
    name += "" if nheads_k == NHEADS_K else ", MHA"
    return Row(name, calls, "TF", 2 * batch * NHEADS * seen * (d + dv))


def packed(lengths: list[int]) -> Row:
    import fa3_fwd_interface as fa3

    ends = torch.tensor([0, *lengths]).cumsum(0)
    cu, most = ends.to("cuda", torch.int32), max(lengths)
    q, k, v = (rand(sum(lengths), heads, HEADDIM) for heads in (NHEADS, NHEADS_K, NHEADS_K))
    arguments = (q, k, v, cu, cu, most, most)
    calls = {
        "ours": partial(fa3_ops.flash_attn_varlen_func, *arguments, causal=True),
        "FA3": partial(fa3.flash_attn_varlen_func, *arguments, causal=True),
    }
    amount = sum(2 * NHEADS * n * n * HEADDIM for n in lengths)
    return Row(f"varlen {len(lengths)} sequences, longest {most}", calls, "TF", amount)


def prefill_rows() -> Iterator[Row]:
    for batch, seqlen in ((16, 1024), (4, 4096), (1, 16384), (1, 1024), (1, 4096)):
        yield dense(batch, seqlen)
    yield dense(4, 4096, dims=(64, 64))
    yield dense(4, 4096, dims=(192, 128))
    yield dense(4, 4096, nheads_k=NHEADS)
    yield dense(1, 16384, window=(1023, 0))
    yield packed([3000, 100, 2500, 700, 1800, 64, 4096, 900, 350, 2048, 128, 1200])
    yield packed([512] * 32)


SECTIONS = {"decode": decode_rows, "prefill": prefill_rows}


def limits() -> dict[str, float]:
    """TB/s of a copy, counted read and written, and TF of a product of matrices."""
    x, y = (torch.empty(2**30, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    m = rand(8192, 8192)
    seconds = time_of({"copy": lambda: y.copy_(x), "product": lambda: m @ m})
    return {
        "TB/s": 2 * x.nbytes / seconds["copy"] / 1e12,
        "TF": 2 * 8192**3 / seconds["product"] / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append")
    parser.add_argument("--vllm-fa3", metavar="LIBRARY")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.vllm_fa3:
        torch.ops.load_library(arguments.vllm_fa3)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = limits()
    print(f"{device}: copies {found['TB/s']:.2f} TB/s, products of matrices {found['TF']:.0f} TF")
    measured = []
    for name in arguments.only or SECTIONS:
        for row in SECTIONS[name]():
            times = time_of(row.calls)
            measured.append(
                {
                    "section": name,
                    "name": row.name,
                    "unit": row.unit,
                    "amount": row.amount,
                    "seconds": times,
                }
            )
            print(row.name)
            for peer, seconds in times.items():
                rate = row.amount / seconds / 1e12
                line = f"    {peer}: {seconds * 1e6:.1f} us, {rate:.2f} {row.unit}"
                if "FA3" in times:
                    line += f", {times['FA3'] / seconds:.2f} of FA3"
                print(line, flush=True)
    if arguments.json:
        record = {"device": device, "limits": found, "rows": measured}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
