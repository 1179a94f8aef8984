"""The bitwise contract, and results against references, on every instruction set of the machine.

A process computes with one of them, so each gets a pytest of its own. Bits are equal within one
instruction set and never compared across two.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import python

import fa3_ops  # noqa: F401

HERE = Path(__file__).parent
FILES = ("test_bitwise", "test_consistency", "test_linear", "test_operators", "test_golden")
CAPABILITY = "import torch, fa3_ops; print(torch.ops.fa3npu.cpu_capability())"


@pytest.mark.parametrize("capability", torch.ops.fa3npu.cpu_capabilities().split(", "))
def test_contract_and_numbers(capability: str) -> None:
    forced = {
        "FA3NPU_CPU_CAPABILITY": capability,
        "FA3NPU_TEST_SHARE": "10",
        "OMP_WAIT_POLICY": "PASSIVE",  # up to 8 threads wait for one another, on any number of cores
    }
    assert python("-c", CAPABILITY, **forced).stdout.split() == [capability]
    result = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"),
        *("-k", "not reference_means"),  # which calls no kernel
        *(str(HERE / f"{name}.py") for name in FILES),
        **forced,
    )
    assert result.returncode == 0, f"{capability}:\n{result.stdout}{result.stderr}"
