"""Every test of this folder runs Triton's kernels in Triton's interpreter, on CPU tensors. It needs
a virtual environment of its own, which `make test-triton` sets up. The folder is not named triton,
because everything in tests/ can be imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

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


def product(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
    """tl.dot by sums in one order, as on devices; numpy rounds a row by where it stands."""
    from triton.runtime.interpreter import TensorHandle

    total = acc.data
    for k in range(a.data.shape[1]):
        column, row = a.data[:, k, None], b.data[k]
        total = total + column.astype(total.dtype) * row.astype(total.dtype)
    return TensorHandle(total, acc.dtype.scalar)


@pytest.fixture(scope="session", autouse=True)
def served_by_triton() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    from fa3_ops import backends
    from fa3_ops.backends import triton

    InterpreterBuilder.create_dot = product
    served = {
        backends.Attention: triton.TritonAttention(),
        backends.Gradient: triton.TritonGradient(),
    }
    for kind, backend in served.items():
        backends.add_backend("cpu", kind, backend)
    with backends.use_backend("triton"):
        yield
    for kind, backend in served.items():
        backends.remove_backend("cpu", kind, backend)
