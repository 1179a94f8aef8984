"""The operators: loads their schemas and CPU kernels, and registers what is in Python for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fa3_ops.ops.schema import full_name_of

_library = torch.library.Library("fa3npu", "FRAGMENT")


def path() -> Path:
    """The compiled library, for programs without Python too."""
    found = next(iter(sorted(Path(__file__).parents[1].glob("_C*.so"))), None)
    if found is None:
        raise ImportError(
            "fa3_ops is not built: run `pip install --no-build-isolation .` where its "
            "pyproject.toml is"
        )
    return found


def load() -> None:
    torch.ops.load_library(path())


def implement(op: Any, kernel: Callable[..., Any], key: str, with_keyset: bool = False) -> None:
    """Makes `kernel` the overload's kernel for one of PyTorch's dispatch keys."""
    _library.impl(full_name_of(op), kernel, key, with_keyset=with_keyset)
