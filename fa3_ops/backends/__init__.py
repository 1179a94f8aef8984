"""Backends: which kernel serves a call, chosen in the open.

docs/life_of_a_call.md follows a call through these files, docs/adding_a_backend.md adds one.
"""

from fa3_ops.backends import choice, devices, dispatch
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
from fa3_ops.backends.dispatch import add_backend, remove_backend, use_backend
from fa3_ops.backends.explain import Explanation, explain
from fa3_ops.backends.fallback import FallbackWarning

__all__ = [
    "Append",
    "Attention",
    "Backend",
    "Combination",
    "Explanation",
    "FallbackWarning",
    "Gradient",
    "Linear",
    "Plan",
    "Request",
    "Rotation",
    "Run",
    "Scatter",
    "add_backend",
    "explain",
    "remove_backend",
    "use_backend",
]


def register() -> None:
    """The devices that this package has backends for."""
    from fa3_ops.backends import cpu, cuda, npu

    for device in (cpu.CPU, cuda.CUDA, npu.NPU):
        devices.add(device)
        if device.key is not None:
            dispatch.serve_by_python(device)
    npu.register_compilers()
    if choice.asked_for() is not None:  # by FA3NPU_BACKEND, for as long as the process lives
        dispatch.intercept()
