"""Device memory as the kernels see it: a base pointer and flat element addresses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import runtime


def cores() -> int:
    """AI cores of the modelled device."""
    return int(os.environ.get("FLASH_ATTN_NPU_STANDIN_CORES", "24"))


def host(tensor: Tensor) -> Tensor:
    """The same bytes as a CPU tensor."""
    if tensor.device.type == "cpu":
        return tensor
    return runtime.host(tensor)


def guarded(argument: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The host function runs on the device of this argument, whichever is the current one."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: object) -> Any:
            x = args[argument] if argument < len(args) else None
            if not isinstance(x, Tensor) or x.device.type == "cpu":
                return function(*args)
            with torch.npu.device(x.device):
                return function(*args)

        return call

    return decorate


def launch(device: torch.device, kernel: Callable[[], None]) -> None:
    """Runs kernel() in order on the current stream, and again at every replay of a graph."""
    if device.type == "cpu":
        kernel()
    else:
        runtime.submit(kernel)


def is_capturing(device: torch.device) -> bool:
    return device.type != "cpu" and torch.npu.is_current_stream_capturing()


class Memory:
    """What lies behind tensor.data_ptr(), or behind its storage: no sizes, no strides."""

    def __init__(self, tensor: Tensor, from_storage: bool = False) -> None:
        if tensor.device.type != "cpu" and tensor.device.index != torch.npu.current_device():
            raise AssertionError(f"a kernel on another device got memory of {tensor.device}")
        start = 0 if from_storage else tensor.storage_offset()
        count = tensor.untyped_storage().nbytes() // tensor.element_size() - start
        self.cells = host(tensor.as_strided((max(count, 0),), (1,), start))

    def _check(self, index: Tensor, what: str) -> None:
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self.cells)):
            raise AssertionError(f"{what} outside the allocation")

    def __getitem__(self, index: int | Tensor) -> Tensor:
        index = torch.as_tensor(index)
        self._check(index, "read")
        return self.cells[index]

    def __setitem__(self, index: int | Tensor, values: Tensor | float) -> None:
        index = torch.as_tensor(index)
        self._check(index, "write")
        self.cells[index] = torch.as_tensor(values, dtype=self.cells.dtype)

    def integer(self, index: int) -> int:
        return int(self[index])


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum in an order that depends on the padded length of dim alone, unlike a BLAS call's."""
    length = 1 << (x.shape[dim] - 1).bit_length()
    if length != x.shape[dim]:
        pad = list(x.shape)
        pad[dim] = length - x.shape[dim]
        x = torch.cat([x, x.new_zeros(pad)], dim)
    while length > 1:
        length //= 2
        x = x.narrow(dim, 0, length) + x.narrow(dim, length, length)
    return x.squeeze(dim)
