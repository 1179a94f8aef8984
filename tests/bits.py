"""Prints a digest of what some calls give on each instruction set, to compare two builds by."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import torch

import fa3_ops

CALLS = [
    {"causal": True},
    {"window_size": (300, 5), "softcap": 15.0},
    {"causal": True, "alibi_slopes": torch.linspace(0.01, 0.5, 4)},
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def digest() -> str:
    """Of outputs, softmax_lse and gradients: of many rows and of few, of several chunks of keys;
    and of linear's results, of several blocks of the depth."""
    sums = hashlib.sha256()
    for dtype in DTYPES:
        for d in (1, 8, 72):
            generator = torch.Generator().manual_seed(d)
            shapes = (70, 4), (1100, 2), (1100, 2)
            inputs = [
                torch.randn(1, n, heads, d, generator=generator).to(dtype).requires_grad_()
                for n, heads in shapes
            ]
            q, k, v = inputs
            for call in CALLS:
                outputs = fa3_ops.flash_attn_func(q, k, v, **call, return_attn_probs=True)
                grads = torch.autograd.grad(outputs[0].sum(), inputs)
                few = fa3_ops.flash_attn_func(q[:, -3:], k, v, **call)
                product = fa3_ops.linear(k.flatten(0, 2).mT, v.flatten(0, 2).mT)
                for x in (*outputs, *grads, few, product):
                    sums.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()[:16]


if __name__ == "__main__":
    if "FA3NPU_CPU_CAPABILITY" in os.environ:
        print(digest())
    else:
        for name in torch.ops.fa3npu.cpu_capabilities().split(", "):
            environment = os.environ | {"FA3NPU_CPU_CAPABILITY": name}
            command = [sys.executable, __file__]
            printed = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            print(f"    {name}: {printed.stdout}", end="", flush=True)
