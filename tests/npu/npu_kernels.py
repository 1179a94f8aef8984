"""The builds of flash_attn_npu: a machine has one at most, tests put others in its place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fa3_ops.backends.npu import device

STANDIN = Path(__file__).parent / "standin"


def standin(folder: str, name: str) -> ModuleType:
    """A raw extension of the stand-in that is not on the path."""
    sys.path.insert(0, str(STANDIN))
    spec = importlib.util.spec_from_file_location(
        f"standin_{name}", STANDIN / folder / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """Replaces the kernel that is installed, release 0.4 for 910."""
    found: device.Kernel | str
    if build == "none":
        found = "flash_attn_npu is not installed"
    elif build == "0.2 for 910":
        found = device.Kernel((0, 2), standin("old", "flash_attn_npu_3"), is_950=False)
    elif build == "0.3 for 910":
        raw = standin("v0_3/flash_attn_npu_3", "flash_attn_npu_3")
        found = device.Kernel((0, 3), raw, is_950=False)
    elif build == "0.4 for 950":
        found = device.Kernel((0, 4), standin("new", "flash_attn_npu_3_950"), is_950=True)
    else:
        assert build == "0.4 for 910", build
        return
    monkeypatch.setattr(device, "kernel", lambda: found)
