"""Which kernels the NPU's Triton backends start, how each would be compiled, and whether that suits
an Ascend 910B. None runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from lint import lint
from lowering import lower
from on_chip import demand
from torch import Tensor

from fa3_ops.backends import Run
from fa3_ops.backends.call import Request
from fa3_ops.backends.npu import NPU

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


def starts_of(request: Request) -> list[Start]:
    """What the NPU's Triton backend starts for a request, whose tensors may be anywhere."""
    backend = next(b for b in NPU.backends[type(request)] if b.name == "triton")
    run = Run(request, NPU, capturing=False, host_may_wait=True)
    assert backend.not_supported_reasons(request, run) == []
    with started() as starts:
        backend.launch(request, backend.lower(request, run), run)
    return starts


def assert_suits(starts: list[Start], findings: list[str] | None = None) -> None:
    """They lower, with no findings but those, and fit on the chip."""
    assert starts
    for start in starts:
        text = lower(start.kernel, start.signature, start.constants)
        assert [str(finding) for finding in lint(text)] == (findings or []), start.name
        assert demand(text).fits, f"{start.name}: {demand(text)}"
