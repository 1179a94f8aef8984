"""What a call costs on the host around the kernel: ours against flash_attn_npu's own Python
function, both with the same kernel. On an NPU, or on the emulated one:

    make npu-shell ARGS=benchmarks/npu_dispatch.py

Prints microseconds a call without the time inside the kernel's extension, and their ratio. A paged
decode, head dimension 128, 32 heads of which 8 are of keys, page size 128, bfloat16.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flash_attn_npu_3 as theirs
import torch

import fa3_ops
from fa3_ops.backends.npu import device

CALLS, ROUNDS = 200, 7


def inputs(batch_size: int, packed: bool) -> dict[str, Any]:
    dtype = torch.bfloat16
    q = torch.randn(batch_size, 1, 32, 128).to(dtype).npu()
    cache = {
        name: torch.zeros(batch_size * 4, 128, 8, 128, dtype=dtype).npu()
        for name in ("k_cache", "v_cache")
    }
    call: dict[str, Any] = {
        "q": q,
        **cache,
        "cache_seqlens": torch.full((batch_size,), 300, dtype=torch.int32).npu(),
        "page_table": torch.arange(batch_size * 4).int().view(batch_size, 4).npu(),
        "causal": True,
        "num_splits": 1,
    }
    if packed:
        call["q"] = q.squeeze(1)
        call["cu_seqlens_q"] = torch.arange(batch_size + 1).int().npu()
        call["max_seqlen_q"] = 1
    return call


def outside_kernel(
    function: Callable[..., Any], call: dict[str, Any], inside: list[float]
) -> float:
    """Median over rounds of the microseconds a call spends outside the kernel's extension."""
    rounds = []
    for _ in range(ROUNDS + 1):
        inside.clear()
        start = time.perf_counter()
        for _ in range(CALLS):
            function(**call)
        total = time.perf_counter() - start
        torch.npu.synchronize()
        rounds.append((total - sum(inside)) / CALLS * 1e6)
    return statistics.median(rounds[1:])


def main() -> None:
    found = device.kernel()
    if isinstance(found, str):
        raise SystemExit(found)
    if "cann_emulator" in sys.modules:  # the stand-in's arithmetic is not what is timed
        from cann_emulator.standin.kernel_model import host

        host.launch = lambda *_: None
    fwd, inside = found.module.fwd, []

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = fwd(*arguments)
        inside.append(time.perf_counter() - start)
        return result

    found.module.fwd = timed
    functions = {
        "flash_attn_npu_3": theirs.flash_attn_with_kvcache,
        "fa3_ops": fa3_ops.flash_attn_with_kvcache,
        "torch.ops.fa3npu": torch.ops.fa3npu.flash_attn_with_kvcache,
    }
    for packed in (False, True):
        for batch_size in (1, 32):
            call = inputs(batch_size, packed)
            times = {name: outside_kernel(f, call, inside) for name, f in functions.items()}
            base = times["flash_attn_npu_3"]
            print(f"{'packed' if packed else 'dense'} q, batch_size {batch_size}")
            for name, t in times.items():
                print(f"  {name:<18} {t:7.1f} us   {t / base:.2f}")


if __name__ == "__main__":
    main()
