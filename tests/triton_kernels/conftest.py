"""Every test of this folder runs Triton's kernels in Triton's interpreter, on CPU tensors. It needs
a virtual environment of its own, which `make test-triton` sets up. The folder is not named triton,
because everything in tests/ can be imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported


def pytest_report_header() -> str:
    if importlib.util.find_spec("triton") is None:
        return "tests/triton_kernels: not collected, there is no triton; see `make test-triton`"
    return "tests/triton_kernels: Triton's interpreter"


def pytest_configure(config: pytest.Config) -> None:
    for warning in (  # the interpreter's own, and numpy's of NaN and infinity
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
        "ignore:.* encountered in:RuntimeWarning",
    ):
        config.addinivalue_line("filterwarnings", warning)


def numbers(handle: Any) -> Any:
    """Its elements; the interpreter keeps those of bfloat16 as their bits."""
    data = handle.data
    is_bits = data.dtype == np.uint16
    return (data.astype(np.uint32) << 16).view(np.float32) if is_bits else data.astype(np.float32)


def product(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
    """tl.dot by sums in one order, as on devices; numpy rounds a row by where it stands."""
    from triton.runtime.interpreter import TensorHandle

    total = acc.data
    rows, columns = numbers(a), numbers(b)
    for k in range(rows.shape[1]):
        total = total + rows[:, k, None] * columns[k]
    return TensorHandle(total, acc.dtype.scalar)


def truncated(self: Any, x: Any, to: Any) -> Any:
    """To bfloat16 by rounding to even, as on devices; the interpreter cuts."""
    from triton.runtime.interpreter import TensorHandle

    if not to.scalar.is_bf16():
        return self.cast_impl(x, to)
    rounded = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), to.scalar)


@pytest.fixture(scope="session", autouse=True)
def served_by_triton() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    from fa3_ops import backends
    from fa3_ops.backends import triton

    InterpreterBuilder.create_dot = product
    InterpreterBuilder.create_fp_trunc = truncated
    served = {
        backends.Attention: triton.TritonAttention(),
        backends.Gradient: triton.TritonGradient(),
        backends.Append: triton.TritonWrites(),
        backends.Combination: triton.TritonCombination(),
        backends.Linear: triton.TritonLinear(),
        backends.Plan: triton.TritonPlan(),
        backends.Rotation: triton.TritonRotation(),
        backends.Scatter: triton.TritonWrites(),
    }
    for kind, backend in served.items():
        backends.add_backend("cpu", kind, backend)
    with backends.use_backend("triton"):
        yield
    for kind, backend in served.items():
        backends.remove_backend("cpu", kind, backend)
