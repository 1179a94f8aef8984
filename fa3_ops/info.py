"""What this installation can do here: `python -m fa3_ops`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

Row = tuple[str, str]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[Row]:
    names = ("torch_npu", "triton", "flash_attn_npu")
    return [
        ("fa3_ops", _version("fa3_ops")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in names),
    ]


def devices() -> list[Row]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        rows += [
            (f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
        ]
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        rows += [(f"npu:{i}", npu.get_device_name(i)) for i in range(npu.device_count())]
    return rows


def backends() -> list[Row]:
    """Every backend of the design, and why one that is not there is not."""
    capability = torch.ops.fa3npu.cpu_capability()
    forced = os.environ.get("FA3NPU_CPU_CAPABILITY")
    cpu = f"available, instruction set {capability}"
    if forced:
        cpu += " (FA3NPU_CPU_CAPABILITY)"
    missing = "not available: this version of fa3_ops has no {} kernels yet"
    return [
        ("cpu", cpu),
        ("npu", missing.format("Ascend NPU")),
        ("triton", missing.format("Triton")),
    ]


def report() -> str:
    """The table as text."""
    sections = {"Versions": versions(), "Devices": devices(), "Backends": backends()}
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<{width}}  {what}" for name, what in rows)]
    return "\n".join(lines[1:])
