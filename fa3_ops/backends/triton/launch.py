"""How a kernel is started, the same on every device and in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.devices import on


def launch(
    kernel: Any, grid: int, *args: Any, num_warps: int = 4, num_stages: int = 1, **more: Any
) -> Any:
    """kernel, a triton.jit function, on a grid of one dimension and the device of its first
    argument, a tensor or the descriptor of one; `more` are its constexprs and a compiler's options.
    Multiply-adds are fused where the source says so and nowhere else. Returns what was compiled."""
    with on(device_of(args[0])):
        return kernel[(grid,)](
            *args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **more
        )


class Launch:
    """`launch` without its first arguments, the tensors and descriptors, which each call brings.

    Triton looks at every argument of every launch to find the kernel that was compiled for its
    kind, which takes the host some 25 microseconds for 70 of them. Here it looks in the first call
    alone: the others must find the same device current, and bring tensors of the same dtypes, that
    start at whole 16 bytes where the first one's do, and None where it had None.
    """

    def __init__(self, kernel: Any, grid: int, *numbers: Any, **more: Any) -> None:
        self.kernel, self.grid, self.numbers, self.more = kernel, grid, numbers, more
        self.start: Callable[..., None] | None = None  # the compiled kernel

    def __call__(self, *tensors: Any) -> None:
        if self.start is not None:
            self.start(*tensors)
            return
        compiled = launch(self.kernel, self.grid, *tensors, *self.numbers, **self.more)
        if is_for_cuda(compiled):
            given = len(tensors) + len(self.numbers)
            constants = (self.more[name] for name in self.kernel.arg_names[given:])
            index = device_of(tensors[0]).index
            self.start = starter(compiled, self.grid, (*self.numbers, *constants), index)


def is_for_cuda(compiled: Any) -> bool:
    """Whether it is a compiled kernel for CUDA, by a Triton that has knobs: those are started as
    below. The interpreter compiles nothing, and how another device's are started is not known."""
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    return getattr(target, "backend", None) == "cuda" and find_spec("triton.knobs") is not None


def starter(compiled: Any, grid: int, numbers: tuple[Any, ...], index: int) -> Callable[..., None]:
    """Starts a compiled kernel with all that its signature has, as Triton does; but Triton prepares
    for profilers where there are none, which takes a third of the time."""
    from triton import knobs
    from triton.runtime import driver

    watched = compiled[(grid, 1, 1)]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = driver.active.get_current_stream

    def start(*tensors: Any) -> None:
        hooks = knobs.runtime
        if listens(hooks.launch_enter_hook) or listens(hooks.launch_exit_hook):
            watched(*tensors, *numbers)
        else:
            stream = stream_of(index)
            run(grid, 1, 1, stream, function, metadata, None, None, None, *tensors, *numbers)

    return start


def listens(hook: Any) -> bool:
    """A profiler's function, or a chain of them that may be empty."""
    return hook is not None and getattr(hook, "calls", True) != []


def device_of(x: Any) -> torch.device:
    """Of a tensor or of the descriptor of one."""
    device: torch.device = getattr(x, "base", x).device
    return device


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Makes contiguous tensors to be written, on the device, which must be current: on CUDA as
    compiled code does, without PyTorch's dispatcher, in a third of the time."""
    try:
        make: Any = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}")
    except AttributeError:
        return partial(torch.empty, shape, dtype=dtype, device=device)
    strides = tuple(prod(shape[i:]) for i in range(1, len(shape) + 1))
    return partial(make, shape, strides, dtype)


def unit_last_stride(t: Tensor) -> Tensor:
    """t, or a copy where its last elements do not lie side by side, as kernels want them."""
    return t if t.stride(-1) == 1 else t.contiguous()
