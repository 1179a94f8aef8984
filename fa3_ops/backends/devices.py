"""The devices that have kernels, and which backends each has for what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention, Request


def _no_capture(at: torch.device) -> bool:
    return False


def _made_anew(make: Callable[[torch.device], Tensor], at: torch.device) -> Tensor:
    return make(at)


def _as_it_is(call: Attention, run: Any) -> Attention:
    return call


def _one_number_per_sequence(cache_seqlens: Tensor) -> Tensor:
    return torch.empty_like(cache_seqlens, memory_format=torch.contiguous_format)


@dataclass
class Device:
    """What belongs to a device and not to one of its backends."""

    device_type: str
    # The dispatch key of its tensors where its kernels are Python; None: they are compiled, and
    # Python is asked only while somebody chooses.
    key: str | None = None
    steady_sums: bool = True  # torch's own: a row's has the same bits in any number of rows
    append_rotates: bool = True  # kvcache_append_ rotates k; else apply_rotary does so before it
    repeats: bool = False  # its calls are looked up among earlier ones (repeated.py)
    # Whether the current stream records a graph, so that no host may wait for the device.
    capturing: Callable[[torch.device], bool] = _no_capture
    # A tensor made by a function of the device alone, which may be kept.
    constant: Callable[[Callable[[torch.device], Tensor], torch.device], Tensor] = _made_anew
    # What is done to an attention before any of its backends is asked.
    prepare: Callable[[Attention, Any], Attention] = _as_it_is
    # An unwritten result of get_scheduler_metadata, from cache_seqlens.
    plan: Callable[[Tensor], Tensor] = _one_number_per_sequence
    # The backends of each kind of request, best first.
    backends: dict[type[Request], list[Any]] = field(default_factory=dict)

    def names(self) -> dict[str, None]:
        """Of all its backends, in order."""
        return {b.name: None for backends in self.backends.values() for b in backends}


_devices: dict[str, Device] = {}


def add(device: Device) -> None:
    _devices[device.device_type] = device


def of(device: torch.device) -> Device:
    """A device that was never added, such as meta, has no backends."""
    return _devices.get(device.type) or Device(device.type)


def on(device: torch.device) -> Any:
    """Makes it the current device, on which kernels are started."""
    return nullcontext() if is_current(device) else torch.get_device_module(device).device(device)


def is_current(device: torch.device) -> bool:
    return device.type == "cpu" or device.index == torch.accelerator.current_device_index()


def names() -> list[str]:
    """The types of those that were added."""
    return list(_devices)


def named(device_type: str) -> Device:
    """One that was added."""
    if device_type not in _devices:
        known = ", ".join(_devices)
        raise ValueError(f"device must be one of {known}, got {device_type}")
    return _devices[device_type]
