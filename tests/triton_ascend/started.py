"""Which kernels a Triton backend starts, and how each would be compiled for it. None runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Start:
    kernel: Any
    signature: dict[str, str]  # of the arguments that are passed
    constants: dict[str, Any]  # the others

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@contextmanager
def started() -> Iterator[list[Start]]:
    """The kernels started inside, in order."""
    starts: list[Start] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        starts.append(_start(kernel, {n: x for n, x in given.items() if n not in OPTIONS}))

    with mock.patch.object(triton.JITFunction, "run", run):
        yield starts


def _start(kernel: Any, given: dict[str, Any]) -> Start:
    """An integer of 1 is a constant to Triton, unless the kernel says not to look."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            constants[name] = value
        else:
            signature[name] = _type(value)
    return Start(kernel, signature, constants)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
