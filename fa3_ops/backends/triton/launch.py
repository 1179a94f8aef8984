"""How a kernel is started, the same on every device and in Triton's interpreter."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def launch(
    kernel: Any, grid: int, *args: Any, num_warps: int = 4, num_stages: int = 1, **more: Any
) -> None:
    """kernel, a triton.jit function, on a grid of one dimension; `more` are its constexprs and a
    compiler's options. Multiply-adds are fused where the source says so and nowhere else."""
    kernel[(grid,)](
        *args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **more
    )


def unit_last_stride(t: Tensor) -> Tensor:
    """t, or a copy where its last elements do not lie side by side, as kernels want them."""
    return t if t.stride(-1) == 1 else t.contiguous()
