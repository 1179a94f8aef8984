"""The CPU: its kernels are compiled (csrc/cpu), so that programs without Python have them too."""

from __future__ import annotations

from typing import Any

from fa3_ops.backends import torch_ops
from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import (
    Append,
    Attention,
    Combination,
    Gradient,
    Linear,
    Plan,
    Request,
    Rotation,
    Scatter,
)
from fa3_ops.backends.devices import Device


class Compiled(Backend[Request]):
    """Serves everything."""

    name = "cpu"
    takes_empty = True

    def is_bitwise(self, request: Request, run: Run) -> bool:
        return True

    def launch(self, request: Request, lowered: Request, run: Run) -> Any:
        assert run.compiled is not None
        results = run.compiled()
        if isinstance(request, Attention) and request.out is not None:
            return request.out, results  # it has written out
        return results


CPU = Device(
    "cpu",
    backends={
        Attention: [Compiled(), torch_ops.TorchAttention()],
        Gradient: [Compiled(), torch_ops.TorchGradient()],
        Append: [Compiled(), torch_ops.TorchWrites()],
        Scatter: [Compiled(), torch_ops.TorchWrites()],
        Linear: [Compiled(), torch_ops.TorchLinear()],
        Rotation: [Compiled(), torch_ops.TorchRotation()],
        Combination: [Compiled(), torch_ops.TorchCombination()],
        Plan: [Compiled()],
    },
)
