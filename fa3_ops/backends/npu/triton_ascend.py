"""The Triton backends on NPU, compiled by Triton-Ascend. No device has run them.

tests/triton_ascend lowers the kernels by the half of its compiler that needs no CANN.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fa3_ops.backends.backend import AnyRequest, Backend, Run
from fa3_ops.backends.call import Attention, Gradient

WIDEST = 256  # headdim_v, of which a tile's sums are in a vector core's memory


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
    """Of a tile, for the 192 KiB of a vector core (tests/triton_ascend/on_chip.py)."""
    return 32 if headdim_v <= 128 else 16


class ByTritonAscend(Backend[AnyRequest]):
    """A Triton backend, whose kernels know no device, as one of the NPU's."""

    def __init__(self, backend: Backend[AnyRequest]) -> None:
        self.backend = backend
        self.name = backend.name

    def not_supported_reasons(self, request: AnyRequest, run: Run) -> list[str]:
        if missing():
            return missing()
        reasons = self.backend.not_supported_reasons(request, run)
        call = request.call if isinstance(request, Gradient) else request
        if isinstance(call, Attention) and call.headdim_v > WIDEST:
            reasons = [*reasons, f"headdim_v {call.headdim_v}"]
        return reasons

    def lower(self, request: AnyRequest, run: Run) -> Any:
        run.note("compiled by Triton-Ascend, and never run on a device")
        return self.backend.lower(request, run)

    def launch(self, request: AnyRequest, lowered: Any, run: Run) -> Any:
        return self.backend.launch(request, lowered, run)
