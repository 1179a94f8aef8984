"""Tests on a GPU. CI has none; `make test-cuda` fails without one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and os.environ.get("FA3NPU_TEST_CUDA") != "1":
        here = Path(__file__).parent
        for item in (item for item in items if item.path.is_relative_to(here)):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def moved(call: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return {name: like(x, device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def like(x: torch.Tensor, device: str) -> torch.Tensor:
    """With its strides, in memory of which the rest is as it was."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
