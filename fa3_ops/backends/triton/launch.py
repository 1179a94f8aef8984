"""How a kernel is started, the same on every device and in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: int, *args: Any, num_warps: int = 4, num_stages: int = 1, **more: Any
) -> None:
    """kernel, a triton.jit function, on a grid of one dimension and the device of its first
    argument, a tensor or the descriptor of one; `more` are its constexprs and a compiler's options.
    Multiply-adds are fused where the source says so and nowhere else."""
    device = getattr(args[0], "base", args[0]).device
    with on(device):
        kernel[(grid,)](
            *args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **more
        )


def on(device: torch.device) -> Any:
    """Makes it the current device, on which Triton starts kernels."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.get_device_module(device).device(device)


def unit_last_stride(t: Tensor) -> Tensor:
    """t, or a copy where its last elements do not lie side by side, as kernels want them."""
    return t if t.stride(-1) == 1 else t.contiguous()
