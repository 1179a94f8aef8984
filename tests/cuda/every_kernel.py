"""Calls that start every kernel of ours on a GPU once, for compute-sanitizer: `make sanitize-cuda`.

compute-sanitizer --tool memcheck python tests/cuda/every_kernel.py
"""

from __future__ import annotations

import os
import sys

# Each tensor has memory of its own, so that what lies behind it is nobody's.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

import fa3_ops

ops = torch.ops.fa3npu
NHEADS, NHEADS_K, HEADDIM, PAGE_SIZE = 8, 2, 128, 16
device = sys.argv[1] if len(sys.argv) > 1 else "cuda"


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def caches(pages: int = 160) -> tuple[Tensor, Tensor]:
    return rand(pages, PAGE_SIZE, NHEADS_K, HEADDIM), rand(pages, PAGE_SIZE, NHEADS_K, HEADDIM)


def attend() -> None:
    """Decode and prefill, whole and in chunks, of caches of 16 and 8 bits, paged and packed. The
    longest fill tiles for each processor of an H100."""
    k, v = caches()
    one = torch.ones(1, device=device)
    f8 = {"k_cache": k.to(torch.float8_e4m3fn), "v_cache": v.to(torch.float8_e4m3fn)}
    for cache in ({"k_cache": k, "v_cache": v}, {**f8, "k_descale": one, "v_descale": one}):
        for rows, lengths in (
            (1, (5, 1277)),
            (1, (0, 300)),
            (70, (1280, 70)),
            (1200, (1280, 1200)),
        ):
            table = torch.randperm(len(k), device=device).int().view(2, -1)
            more = {"cache_seqlens": ints(*lengths), "page_table": table, "causal": True}
            fa3_ops.flash_attn_with_kvcache(rand(2, rows, NHEADS, HEADDIM), **cache, **more)
    q, k, v = (rand(2400, heads, HEADDIM) for heads in (NHEADS, NHEADS_K, NHEADS_K))
    ends = ints(0, 1013, 2400)
    ops.flash_attn_varlen_func(q, k, v, ends, ends, 1387, 1387, causal=True)


def differentiate() -> None:
    q, k, v = (rand(2, 333, heads, HEADDIM) for heads in (NHEADS, NHEADS_K, NHEADS_K))
    out, softmax_lse = ops.flash_attn_func(q, k, v, causal=True)
    ops.flash_attn_func_backward(rand(*out.shape), q, k, v, out, softmax_lse, causal=True)


def write() -> None:
    """What has no place, too."""
    k_cache, v_cache = caches(40)
    k, v = rand(2, 3, NHEADS_K, HEADDIM), rand(2, 3, NHEADS_K, HEADDIM)
    table = torch.randperm(40, device=device).int().view(2, 20)
    rotary = rand(400, HEADDIM // 2), rand(400, HEADDIM // 2)
    lengths = ints(300, 317)
    ops.kvcache_append_(k, v, k_cache, v_cache, lengths, None, table, None, *rotary)
    slots = ints(0, 5, -1, 639, 638, 7)
    fa3_ops.kvcache_scatter_(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots)
    ops.apply_rotary(k, *rotary, lengths)


def others() -> None:
    ops.linear(rand(100, 200), rand(300, 200))
    parts = torch.randn(3, 2, 5, NHEADS, HEADDIM, device=device)
    ops.flash_attn_combine(parts, torch.randn(3, 2, 5, NHEADS, device=device))


if __name__ == "__main__":
    with torch.no_grad():
        for calls in (attend, differentiate, write, others):
            calls()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel was started")
