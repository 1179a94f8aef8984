"""`python -m fa3_ops` and the choice of the instruction set."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from processes import python

import fa3_ops
from fa3_ops.backends.npu import device as npu_device
from fa3_ops.backends.npu.device import Kernel
from fa3_ops.tools import info


def test_report() -> None:
    printed = python("-m", "fa3_ops").stdout.splitlines()
    rows = dict(line.split(maxsplit=1) for line in printed if line.startswith("  "))
    assert [line for line in printed if line and not line.startswith(" ")] == [
        "Versions",
        "Devices",
        "Backends",
    ]
    assert rows["torch"] == torch.__version__
    assert rows["fa3_ops"] == fa3_ops.__version__
    # "cpu" is a device and a backend; the backend comes last
    assert rows["cpu"].startswith("available, instruction set ")
    assert rows["cuda"].startswith("" if torch.cuda.is_available() else "not available: torch ")


def test_report_does_not_import_torch_npu(tmp_path: Path) -> None:
    """Where CANN is missing, importing it fails."""
    (tmp_path / "torch_npu.py").write_text("raise SystemExit('imported')")
    variables = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    printed = python("-m", "fa3_ops", **variables).stdout
    assert "torch_npu is installed and was not imported with torch" in printed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("flash_attn_npu is not installed", "torch (flash_attn_npu is not installed)"),
        (Kernel((0, 4), ModuleType("raw"), False), "available: flash_attn_npu 0.4, fused"),
    ],
)
def test_what_an_npu_has(monkeypatch: pytest.MonkeyPatch, found: Any, said: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    device = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "npu", device, raising=False)
    assert info.npu() == "not available: torch_npu finds no device"
    device.is_available = lambda: True
    monkeypatch.setattr(npu_device, "kernel", lambda: found)
    assert said in info.npu()


def test_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.cuda() == "not available: torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info.cuda() == "not available: torch finds no device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert info.cuda() == "available: torch (triton is not installed)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert info.cuda().startswith("available: triton, torch; ")


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert info.npu() == "not available: torch_npu is not installed"


def test_help_names_the_commands() -> None:
    printed = python("-m", "fa3_ops", "--help")
    assert printed.returncode == 0
    assert "consistency" in printed.stdout
    assert "doctor" in printed.stdout


def test_importing_the_operators_imports_no_tool() -> None:
    code = "import sys, fa3_ops; print([m for m in sys.modules if m.startswith(%s)])"
    rooms = "('fa3_ops.tools', 'fa3_ops.testing', 'tabulate')"
    assert python("-c", code % rooms).stdout.strip() == "[]"


def test_instruction_set_can_be_forced() -> None:
    code = "import torch, fa3_ops; print(torch.ops.fa3npu.cpu_capability())"
    names = torch.ops.fa3npu.cpu_capabilities()
    best, last = names.split(", ")[0], names.split(", ")[-1]
    assert python("-c", code, FA3NPU_CPU_CAPABILITY="").stdout.strip() == best
    assert python("-c", code, FA3NPU_CPU_CAPABILITY=last).stdout.strip() == last
    wrong = python("-c", code, FA3NPU_CPU_CAPABILITY="MMX")
    assert wrong.returncode != 0
    assert f"FA3NPU_CPU_CAPABILITY must be one of {names} on this machine, got MMX" in wrong.stderr
