"""Compiles kernels for an H100 on a machine without one: Triton has all that it takes. Prints the
name of each kernel that is compiled, and how many bytes of code it has.

    python compile_for_cuda.py samples  what the sample calls of the operators start
    python compile_for_cuda.py lengths  calls that differ in their numbers of rows
    python compile_for_cuda.py attention  attention with what decides on its kernels
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fa3_ops
from fa3_ops import backends
from fa3_ops.backends import triton
from fa3_ops.backends.cuda import prefill
from fa3_ops.backends.triton import attention, gradient, narrow
from fa3_ops.testing import sample_calls
from fa3_ops.testing.samples import rand, rotary

ops = torch.ops.fa3npu
SERVED = {
    backends.Attention: prefill.CudaAttention(),
    backends.Append: triton.TritonWrites(),
    backends.Combination: triton.TritonCombination(),
    backends.Gradient: triton.TritonGradient(),
    backends.Linear: triton.TritonLinear(),
    backends.Rotation: triton.TritonRotation(),
    backends.Scatter: triton.TritonWrites(),
}
OPERATORS = (
    *("kvcache_append_", "kvcache_scatter_", "linear", "apply_rotary", "flash_attn_combine"),
    *("flash_attn_func_backward", "flash_attn_varlen_func_backward"),
)


class H100:
    """As much of a driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


run = JITFunction.run
known: set[str] = set()


def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    if kernel.hash not in known:
        known.add(kernel.hash)
        print(self.__name__, len(kernel.asm["cubin"]), flush=True)


def samples() -> None:
    for call in sample_calls(dtype=torch.bfloat16):
        if call.name.startswith(OPERATORS):
            call.operator(*call.args, **call.kwargs)


def lengths() -> None:
    (cos, sin), weight = rotary(64, 16), rand(32, 64).half()
    for tokens in (16, 1, 2, 3, 5, 8, 13):
        x = rand(tokens, 2, 64).half()
        dense, lse = x[None], rand(1, 2, tokens)
        ops.flash_attn_func_backward(dense, dense, dense, dense, dense, lse, causal=True)
        caches = torch.zeros(2, tokens + 3, 16, 2, 64, dtype=torch.half)
        odd = tokens % 2  # slices, now and then at odd addresses
        cu_seqlens = torch.tensor([0, 0, 0, tokens], dtype=torch.int32)[odd:]
        fa3_ops.kvcache_scatter_(x, x, *caches, torch.arange(tokens + 1)[odd : tokens + odd])
        ops.apply_rotary(x, cos, sin, cu_seqlens[:-1], cu_seqlens)
        ops.linear(x.flatten(0, 1)[:16], weight)
        ops.flash_attn_combine(rand(tokens, tokens, 2, 64), rand(tokens, tokens, 2))
        for processors in (1, 1000):
            attention.processors = prefill.processors = lambda device, n=processors: n
            attend(1, 64 * (tokens + 9), page_size=64)
        prefill.processors = lambda device: 1
        attend(64 + tokens, 64 * (tokens + 9))


def attend(tokens: int, keys: int, page_size: int = 0, **more: Any) -> None:
    """Of one sequence, over pages if they have a size."""
    q, dtype = rand(1, tokens, 4, more.pop("headdim", 64)), more.pop("dtype", torch.bfloat16)
    k = rand(1, keys, 2, q.shape[-1]).to(more.pop("cache", dtype))
    if page_size:
        k = k.view(-1, page_size, 2, q.shape[-1])
        more["page_table"] = torch.arange(len(k), dtype=torch.int32)[None]
    fa3_ops.flash_attn_with_kvcache(q.to(dtype), k, k, cache_seqlens=keys, causal=True, **more)


def attentions() -> None:
    everything: dict[str, Any] = {
        "cache_leftpad": torch.ones(1, dtype=torch.int32),
        "cache_start": torch.ones(1, dtype=torch.int32),
        "cache_batch_idx": torch.zeros(1, dtype=torch.int32),
    }
    for processors in (1, 1000):  # whole sequences, and chunks as work items
        attention.processors = prefill.processors = lambda device, n=processors: n
        for tokens in (1, 70):
            for keys in (1024, 1088, 4096):
                attend(tokens, keys)
                attend(tokens, keys, page_size=64)
        attend(1, 1024, page_size=16)
    for cache in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for tokens in (1, 70):
            attend(tokens, 1024, cache=cache, k_descale=torch.ones(1))
    attend(70, 1024, softcap=5.0, alibi_slopes=torch.ones(4), sinks=torch.ones(4), **everything)
    attend(70, 1024, attention_chunk=50, window_size=(9, 0), headdim=96)
    attend(1, 1024, headdim=512, qv=rand(1, 1, 4, 512).bfloat16())
    attend(70, 1024, dtype=torch.float32)


if __name__ == "__main__":
    driver.set_active(H100())
    for module in (attention, gradient, narrow):
        module.has_descriptors = lambda device: True
    prefill.is_hopper = lambda device: True
    JITFunction.run = only_compile
    for kind, backend in SERVED.items():
        backends.add_backend("cpu", kind, backend)
    with backends.use_backend("triton"), torch.no_grad():
        {"samples": samples, "lengths": lengths, "attention": attentions}[sys.argv[1]]()
