"""The Triton backends on NPU, compiled by Triton-Ascend. No device has run them.

tests/triton_ascend lowers the kernels by the half of its compiler that needs no CANN.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fa3_ops.backends.backend import AnyRequest, Backend, Run
from fa3_ops.backends.call import Attention, Gradient, Request
from fa3_ops.backends.triton import gradient, linear

# Tiles are for the 192 KiB of a vector core, which tests/triton_ascend/on_chip.py counts.
WIDEST = 256  # columns of what a tile sums


def is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def missing() -> list[str]:
    """Why `import triton` would not find Triton-Ascend, which has the original's name. Told without
    importing it, which looks for a device."""
    if not is_installed("triton-ascend"):
        return ["triton-ascend is not installed"]
    if is_installed("triton"):
        return ["triton is installed over triton-ascend"]
    return []


def most_rows(headdim_v: int) -> int:
    """Of a tile of attention."""
    return 32 if headdim_v <= 128 else 16


def blocks_of(call: Attention) -> tuple[gradient.Blocks, gradient.Blocks]:
    """Of the gradient's kernels of keys and of rows."""
    keys = (64, 32) if gradient.width_of(call) <= 192 else (32, 16)
    return gradient.Blocks(*keys, 4, 1), gradient.Blocks(32, 64, 4, 1)


def tile_for(rows: int, dtype: torch.dtype) -> linear.Tile:
    return linear.tile_for(min(rows, linear.SOME), dtype)


def width_of(request: Request) -> int:
    """Columns of what a tile sums."""
    if isinstance(request, Gradient):
        return max(request.call.headdim, request.call.headdim_v)
    return request.headdim_v if isinstance(request, Attention) else 0


class ByTritonAscend(Backend[AnyRequest]):
    """A Triton backend, whose kernels know no device, as one of the NPU's."""

    def __init__(self, backend: Backend[AnyRequest]) -> None:
        self.backend = backend
        self.name = backend.name

    def not_supported_reasons(self, request: AnyRequest, run: Run) -> list[str]:
        if missing():
            return missing()
        reasons = self.backend.not_supported_reasons(request, run)
        if width_of(request) > WIDEST:
            reasons = [*reasons, f"head dimension {width_of(request)}"]
        return reasons

    def lower(self, request: AnyRequest, run: Run) -> Any:
        run.note("compiled by Triton-Ascend, and never run on a device")
        return self.backend.lower(request, run)

    def launch(self, request: AnyRequest, lowered: Any, run: Run) -> Any:
        return self.backend.launch(request, lowered, run)
