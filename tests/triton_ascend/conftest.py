"""These tests compile the Triton kernels by Triton-Ascend, which is imported as triton like the
original and so needs a virtual environment of its own: `make test-triton-ascend` sets it up."""

from __future__ import annotations

from importlib.metadata import distributions

INSTALLED = any(d.name == "triton-ascend" for d in distributions())

if not INSTALLED:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    if not INSTALLED:
        return "tests/triton_ascend: not collected here; `make test-triton-ascend` runs them"
    return "Triton-Ascend's front half, without CANN"
