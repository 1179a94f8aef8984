"""How long the host is busy with one decode call on a GPU.

    python benchmarks/gpu_host_time.py [--vllm-fa3 _vllm_fa3_C.abi3.so]

Calls are made in batches so small that the GPU's queue has room for them, between which the host
waits for it; the batches of all calls take turns. Of a call's batches the best and the median
count. Decode is of 8 sequences of 4096 keys, one row of q each, over pages of 16, with 32 heads, 8
KV heads, head dimension 128 and bfloat16. Beside it: PyTorch's own attention of the same shapes,
dense; FlashAttention-3 (fa3-fwd, dense; or the library inside a CUDA wheel of vLLM, over pages), if
there is one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_attention import HEADDIM, NHEADS, NHEADS_K, Call, rand, vllm_fa3
from limits import field
from torch import Tensor

import fa3_ops
from fa3_ops.backends import repeated

ops = torch.ops.fa3npu
BATCH, SEQLEN, PAGE = 8, 4096, 16
CALLS, ROUNDS = 20, 30  # calls of a batch, batches


def host_times(calls: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """Best and median microseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()  # which compiles it, or is its first one since all was forgotten
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    return {name: (min(some), statistics.median(some)) for name, some in times.items()}


def anew(call: Call) -> Call:
    """Without what is kept of earlier calls."""

    def forgetting() -> Any:
        repeated.forget()
        return call()

    return forgetting


def ours(q: Tensor, new: tuple[Tensor, Tensor], lengths: Tensor, table: Tensor) -> dict[str, Call]:
    pages = BATCH * SEQLEN // PAGE
    caches = tuple(rand(pages, PAGE, NHEADS_K, HEADDIM) for _ in range(2))
    cached = {"cache_seqlens": lengths, "page_table": table, "causal": True}
    tables = {f"rotary_{name}": rand(SEQLEN, HEADDIM // 2) for name in ("cos", "sin")}
    calls: dict[str, Call] = {}
    for name, function in (
        ("fa3_ops", fa3_ops.flash_attn_with_kvcache),
        ("torch.ops.fa3npu", ops.flash_attn_with_kvcache),
    ):
        calls[f"{name}, attention"] = partial(function, q, *caches, **cached)
        append = partial(function, q, *caches, *new, **cached)
        calls[f"{name}, append and attention"] = append
        calls[f"{name}, append with rotary and attention"] = partial(append, **tables)
        calls[f"{name}, append and attention, as if for the first time"] = anew(append)
    calls["kvcache_append_ alone"] = partial(
        ops.kvcache_append_, *new, *caches, lengths, page_table=table
    )
    calls["flash_attn_kvcache alone"] = partial(ops.flash_attn_kvcache, q, *caches, **cached)
    packed, ends = q[:, 0], torch.arange(BATCH + 1, dtype=torch.int32, device="cuda")
    calls["flash_attn_varlen_func into out, as vLLM calls it"] = partial(
        *(fa3_ops.flash_attn_varlen_func, packed, *caches, ends, None, 1, SEQLEN),
        **{"seqused_k": lengths, "block_table": table, "causal": True},
        out=torch.empty_like(packed),
    )
    return calls


def peers(q: Tensor, new: tuple[Tensor, Tensor], lengths: Tensor, table: Tensor) -> dict[str, Call]:
    dense = [rand(BATCH, SEQLEN, NHEADS_K, HEADDIM) for _ in range(2)]
    heads_first = [x.transpose(1, 2) for x in (q, *dense)]
    sdpa = partial(F.scaled_dot_product_attention, *heads_first, enable_gqa=True)
    calls: dict[str, Call] = {"F.scaled_dot_product_attention": sdpa}
    calls["torch.add of the lengths"] = partial(torch.add, lengths, 1)
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except ImportError:
        print("fa3_fwd is not installed")
    else:
        attention = partial(flash_attn_with_kvcache, q, *dense, cache_seqlens=lengths, causal=True)
        calls["FA3 (fa3_fwd), attention"] = attention
        calls["FA3 (fa3_fwd), append and attention"] = partial(attention, k=new[0], v=new[1])
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        pages = [x.view(-1, PAGE, NHEADS_K, HEADDIM) for x in dense]
        calls["FA3 (vLLM), attention over pages"] = vllm_fa3(q, *pages, lengths, table, (-1, -1))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-fa3", metavar="LIBRARY")
    arguments = parser.parse_args()
    if arguments.vllm_fa3:
        torch.ops.load_library(arguments.vllm_fa3)
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(
        f"{torch.cuda.get_device_name()}, {versions}, host {field('/proc/cpuinfo', 'model name')}"
    )
    lengths = torch.full((BATCH,), SEQLEN - 100, dtype=torch.int32, device="cuda")
    table = torch.randperm(BATCH * SEQLEN // PAGE, device="cuda").int().view(BATCH, -1)
    q = rand(BATCH, 1, NHEADS, HEADDIM)
    new = (rand(BATCH, 1, NHEADS_K, HEADDIM), rand(BATCH, 1, NHEADS_K, HEADDIM))
    with torch.no_grad():
        calls = ours(q, new, lengths, table) | peers(q, new, lengths, table)
        for name, (best, median) in host_times(calls).items():
            print(f"{name}: best {best:.1f} us, median {median:.1f} us")


if __name__ == "__main__":
    main()
