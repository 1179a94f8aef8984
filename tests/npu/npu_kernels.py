"""The builds of flash_attn_npu: a machine has one at most, tests put others in its place."""

from __future__ import annotations

import pytest
from cann_emulator import standin

from fa3_ops.backends.npu import device

VERSIONS = {"0.2 for 910": (0, 2), "0.3 for 910": (0, 3), "0.4 for 950": (0, 4)}


def put(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """Replaces the kernel that is installed, release 0.4 for 910."""
    found: device.Kernel | str
    if build == "0.4 for 910":
        return
    if build == "none":
        found = "flash_attn_npu is not installed"
    else:
        found = device.Kernel(VERSIONS[build], standin.extension(build), build.endswith("950"))
    monkeypatch.setattr(device, "kernel", lambda: found)
