"""What the kernels have to know of a device."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@functools.cache
def missing() -> list[str]:
    return [] if importlib.util.find_spec("triton") else ["triton is not installed"]


def reasons_against(dtype: torch.dtype) -> list[str]:
    return missing() if dtype in DTYPES else [*missing(), f"dtype {dtype}"]


@functools.cache
def processors(device: torch.device) -> int:
    """Of which each works off a tile at a time, or a few."""
    if device.type == "cpu":
        return 1  # Triton's interpreter
    properties = _properties(device)
    return int(getattr(properties, "cube_core_num", 0) or properties.multi_processor_count)


def programs(items: int, device: torch.device) -> int:
    """How many programs share the work items: one for each, but where every core has one program at
    a time, as many as there are cores."""
    one_at_a_time = device.type != "cpu" and hasattr(_properties(device), "cube_core_num")
    return min(items, processors(device)) if one_at_a_time else items


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether blocks are copied by tensor descriptors: a Triton that has them, for a device whose
    copy engine takes them."""
    known = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    capability = getattr(torch.get_device_module(device), "get_device_capability", None)
    return known and capability is not None and capability(device) >= (9, 0)
