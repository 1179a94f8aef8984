"""Compiles kernels for an H100 on a machine without one: Triton has all that it takes. Prints the
name of each kernel that is compiled, and how many bytes of code it has.

    python compile_for_cuda.py samples  what the sample calls of the operators start
    python compile_for_cuda.py lengths  calls that differ in their numbers of rows
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
from fa3_ops.backends.triton import gradient
from fa3_ops.testing import sample_calls
from fa3_ops.testing.samples import rand, rotary

ops = torch.ops.fa3npu
SERVED = {
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
    for dtype in (torch.bfloat16, torch.float32):
        for call in sample_calls(dtype=dtype):
            if call.name.startswith(OPERATORS):
                call.operator(*call.args, **call.kwargs)


def lengths() -> None:
    (cos, sin), weight = rotary(64, 16), rand(32, 64).half()
    for tokens in (16, 1, 2, 3, 5, 8, 13):
        x = rand(tokens, 2, 64).half()
        dense, lse = x[None], rand(1, 2, tokens)
        ops.flash_attn_func_backward(dense, dense, dense, dense, dense, lse, causal=True)
        caches = torch.zeros(2, tokens + 3, 16, 2, 64, dtype=torch.half)
        cu_seqlens = torch.tensor([0, 0, tokens], dtype=torch.int32)
        fa3_ops.kvcache_scatter_(x, x, *caches, torch.arange(tokens))
        ops.apply_rotary(x, cos, sin, cu_seqlens[:2], cu_seqlens)
        ops.linear(x.flatten(0, 1)[:16], weight)
        ops.flash_attn_combine(rand(tokens, tokens, 2, 64), rand(tokens, tokens, 2))


if __name__ == "__main__":
    driver.set_active(H100())
    gradient.has_descriptors = lambda device: True
    JITFunction.run = only_compile
    for kind, backend in SERVED.items():
        backends.add_backend("cpu", kind, backend)
    with backends.use_backend("triton"), torch.no_grad():
        {"samples": samples, "lengths": lengths}[sys.argv[1]]()
