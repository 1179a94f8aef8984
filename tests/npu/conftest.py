"""Every test of this folder runs on the emulated NPU: see emulator/README.md. It needs torch_npu
and so a virtual environment of its own, which `make test` sets up."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Tiny models, for test_npu_transformers.py.
sys.path.append(str(Path(__file__).parents[1] / "transformers_5"))

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Work runs when something waits for it, so that a missing wait gives wrong numbers; fresh
    # memory holds NaN; every block is its own, so that a write past its end is found.
    os.environ.setdefault("CANNEMU_LAZY", "1")
    os.environ.setdefault("CANNEMU_POISON", "1")
    os.environ.setdefault("PYTORCH_NO_NPU_MEMORY_CACHING", "1")
    os.environ.setdefault("CANNEMU_DEVICES", "2")
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")  # a launch that fails says so where it is
    import cann_emulator.standin
    import torchair

    cann_emulator.standin.use("0.4")

    # torchair's table of decompositions does not build after npugraph_ex's (torch_npu 2.13.0).
    torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())


def pytest_report_header() -> str:
    if importlib.util.find_spec("torch_npu") is None:
        return "tests/npu: not collected here, there is no torch_npu; `make test` runs them"
    return f"emulated NPU: {os.environ.get('CANNEMU_SOC', 'Ascend910B1')}"


@pytest.fixture(autouse=True)
def every_warning_again() -> None:
    """A fallback warns once a process; here, once a test."""
    from fa3_ops.backends import fallback

    fallback._warned.clear()


@pytest.fixture(params=["0.4 for 910", "0.3 for 910", "0.2 for 910", "0.4 for 950", "none"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the builds; without any, CANN's fused_infer_attention and torch serve."""
    from npu_kernels import put

    put(monkeypatch, request.param)


@pytest.fixture
def batch_invariant_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Ascend's package as vLLM-Ascend's source calls it, and what it is called with. It keeps the
    package's promise: each element is a sum of its own."""
    import torch

    from fa3_ops.backends.npu.batch_invariant_ops import is_installed

    called = []

    def mm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        called.append((x, y))
        return (x[:, None].float() * y.t().float()).sum(-1).to(x.dtype)

    library = torch.library.Library("batch_invariant_ops", "DEF")
    library.define("npu_mm_batch_invariant(Tensor self, Tensor mat2) -> Tensor")
    library.impl("npu_mm_batch_invariant", mm, "PrivateUse1")
    module = ModuleType("batch_invariant_ops")
    module.__spec__ = ModuleSpec("batch_invariant_ops", None)
    monkeypatch.setitem(sys.modules, "batch_invariant_ops", module)
    is_installed.cache_clear()
    yield called
    is_installed.cache_clear()
    library._destroy()
