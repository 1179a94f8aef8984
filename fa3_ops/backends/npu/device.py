"""What this machine has: the NPU, its runtime, and flash_attn_npu under either of its names."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def soc_name() -> str:
    """Such as "Ascend910B1"."""
    import torch_npu

    name: str = torch_npu.npu.get_device_name()
    return name


def is_950() -> bool:
    return soc_name().startswith("Ascend950")


@functools.cache
def cann_release() -> tuple[int, int] | None:
    """(8, 5) of CANN 8.5.0; None if it does not say."""
    import torch_npu

    try:
        found = re.match(r"(\d+)\.(\d+)", torch_npu.npu.utils.get_cann_version())
    except (AttributeError, RuntimeError):  # an older torch_npu, or a CANN that it cannot ask
        return None
    return (int(found[1]), int(found[2])) if found else None


def capturing(at: torch.device) -> bool:
    """Whether the current stream of a device records a graph, so that the host must not wait."""
    import torch_npu

    if at.index == torch.accelerator.current_device_index():
        return bool(torch_npu.npu.is_current_stream_capturing())
    with torch_npu.npu.device(at):  # some microseconds
        return bool(torch_npu.npu.is_current_stream_capturing())


_constants: dict[tuple[Callable[[torch.device], Tensor], torch.device], Tensor] = {}


def constant(make: Callable[[torch.device], Tensor], at: torch.device) -> Tensor:
    """make(at), made once a device and for all of its streams, so that the first time waits. In a
    capture it is part of the graph, whose memory it lies in; make must ask nothing of the host."""
    if (found := _constants.get((make, at))) is not None:
        return found
    made = make(at)
    if not capturing(at):
        import torch_npu

        torch_npu.npu.current_stream(at).synchronize()
        _constants[make, at] = made
    return made


@dataclass(frozen=True)
class Kernel:
    """The raw extension of an installed flash_attn_npu. Its Python functions are not used: they
    declare no mutation, and only some versions have them all."""

    version: tuple[int, ...]
    module: ModuleType
    is_950: bool


def _version() -> tuple[int, ...]:
    numbers = importlib.metadata.version("flash_attn_npu").split("+")[0].split(".")[:2]
    return tuple(int(number) for number in numbers)


@functools.cache
def kernel() -> Kernel | str:
    """The installed flash_attn_npu, or why there is none to use.

    Since 0.3 the extension is `flash_attn_npu_3.flash_attn_npu_3`, on a 950 the top-level
    `flash_attn_npu_3_950`; before, it was the top-level module `flash_attn_npu_3`.
    """
    name = "flash_attn_npu_3_950" if is_950() else "flash_attn_npu_3"
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return "flash_attn_npu is not installed"
        if spec.submodule_search_locations is not None:
            name = f"{name}.{name}"
        return Kernel(_version(), importlib.import_module(name), is_950())
    except (ImportError, OSError, RuntimeError) as error:
        return f"flash_attn_npu does not load: {error}"


def found_kernel() -> Kernel:
    """Where a backend has said that there is one."""
    found = kernel()
    assert isinstance(found, Kernel), found
    return found
