"""`python -m fa3_ops` and the choice of the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fa3_ops


def run(code: list[str], capability: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FA3NPU_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=environment, check=False
    )


def test_report() -> None:
    printed = run(["-m", "fa3_ops"]).stdout.splitlines()
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
    assert "no Ascend NPU kernels" in rows["npu"]


def test_instruction_set_can_be_forced() -> None:
    code = ["-c", "import torch, fa3_ops; print(torch.ops.fa3npu.cpu_capability())"]
    assert run(code, "portable").stdout.strip() == "portable"
    wrong = run(code, "MMX")
    assert wrong.returncode != 0
    assert "FA3NPU_CPU_CAPABILITY must be one of" in wrong.stderr


SUPPORTED = [
    name
    for name in ("AVX512", "AVX2", "portable")
    if run(["-c", "import torch, fa3_ops; torch.ops.fa3npu.cpu_capability()"], name).returncode == 0
]


@pytest.mark.parametrize("capability", SUPPORTED)
def test_golden_vectors_on_every_instruction_set(capability: str) -> None:
    """The machine's best is what every other test runs on."""
    here = os.path.dirname(__file__)
    result = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"{here}/test_golden.py"], capability
    )
    assert result.returncode == 0, result.stdout
    assert "157 passed" in result.stdout
