"""What lowers to ttadapter, and what Triton-Ascend says of what does not."""

from __future__ import annotations

import re
import signal
import subprocess
from contextlib import nullcontext
from typing import Any

import pytest
import triton
import triton.language as tl
from lowering import RUNS, NotLowered, lower


@triton.jit
def multiplies(x, y, out, bias, N: tl.constexpr):
    at = tl.arange(0, N)
    tile = at[:, None] * N + at[None, :]
    product = tl.dot(tl.load(x + tile), tl.load(y + tile))
    if bias is not None:
        product += tl.load(bias + at)[None, :]
    tl.store(out + tile, product.to(out.dtype.element_ty))


@triton.jit
def nothing_if_not(x):
    if x is not None:
        x += 1
    return x


@triton.jit
def gets_nothing(x, y, out, bias, N: tl.constexpr):
    tl.store(out, tl.load(nothing_if_not(x)) + (nothing_if_not(bias) is None))


@triton.jit
def loads_fp8(x, y, out, bias, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(x + tl.arange(0, N)).to(tl.float32))


MATRICES = {"x": "*bf16", "y": "*bf16", "out": "*bf16"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_product(dtype: str) -> None:
    types = {name: f"*{dtype}" for name in MATRICES}
    element = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}[dtype]
    text = lower(multiplies, types, {"bias": None, "N": 32})
    assert "func.func @multiplies" in text
    assert re.search(rf"linalg.matmul .*: tensor<32x32x{element}>, tensor<32x32x{element}>", text)


def test_a_tensor_that_is_given_is_read() -> None:
    without = lower(multiplies, MATRICES, {"bias": None, "N": 32})
    given = lower(multiplies, MATRICES | {"bias": "*fp32"}, {"N": 32})
    assert (without.count("memref.copy"), given.count("memref.copy")) == (2, 3)


@pytest.mark.parametrize(
    ("kernel", "types", "reason"),
    [
        (gets_nothing, MATRICES, "cannot convert None"),
        (loads_fp8, MATRICES | {"x": "*fp8e5"}, "fp8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_it_does_not_take(kernel: object, types: dict[str, str], reason: str) -> None:
    with pytest.raises(NotLowered, match=reason):
        lower(kernel, types, {"bias": None, "N": 32})


def test_every_argument_has_to_be_accounted_for() -> None:
    with pytest.raises(TypeError, match=r"neither typed nor constant: bias; no argument: z"):
        lower(multiplies, MATRICES | {"z": "i32"}, {"N": 32})


@pytest.mark.parametrize("crashes", [2, 3])
def test_a_program_that_crashes_is_run_again(crashes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    died = iter([True] * crashes)
    run = subprocess.run

    def sometimes(*args: Any, **keywords: Any) -> Any:
        if next(died, False):
            raise subprocess.CalledProcessError(-signal.SIGSEGV, "program", stderr=b"Stack dump")
        return run(*args, **keywords)

    monkeypatch.setattr(subprocess, "run", sometimes)
    expected = nullcontext() if crashes < RUNS else pytest.raises(NotLowered, match="Stack dump")
    with expected:
        lower(multiplies, MATRICES, {"bias": None, "N": 32})


def test_what_is_refused_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*args: Any, **keywords: Any) -> Any:
        asked.append(args)
        raise subprocess.CalledProcessError(1, "program", stderr=b"error: unsupported")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(NotLowered, match="unsupported"):
        lower(multiplies, MATRICES, {"bias": None, "N": 32})
    assert len(asked) == 1
