"""What this installation can do here: `python -m fa3_ops`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import textwrap

import torch
from tabulate import tabulate

Row = tuple[str, str]


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[Row]:
    names = ("torch_npu", "flash_attn_npu", "triton", "flash_attn_3", "fa3_fwd", "flash-attn-4")
    return [
        ("fa3_ops", version("fa3_ops")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, version(name)) for name in names),
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


def cpu() -> str:
    ops = torch.ops.fa3npu
    forced = " (FA3NPU_CPU_CAPABILITY)" if os.environ.get("FA3NPU_CPU_CAPABILITY") else ""
    return f"available, instruction set {ops.cpu_capability()}{forced} of {ops.cpu_capabilities()}"


def npu() -> str:
    """Looks only at what is imported: importing torch_npu where CANN is missing fails."""
    if importlib.util.find_spec("torch_npu") is None:
        return "not available: torch_npu is not installed"
    imported = getattr(torch, "npu", None)
    if imported is None:
        return "not available: torch_npu is installed and was not imported with torch"
    if not imported.is_available():
        return "not available: torch_npu finds no device"
    from fa3_ops.backends.npu import device

    found = device.kernel()
    if isinstance(found, str):
        return f"available: fused_infer_attention, torch ({found})"
    numbers = ".".join(map(str, found.version))
    return f"available: flash_attn_npu {numbers}, fused_infer_attention, torch"


def cuda() -> str:
    """FlashAttention's packages are named by their versions: importing one may take seconds."""
    if torch.version.cuda is None:
        return "not available: torch is built without CUDA"
    if not torch.cuda.is_available():
        return "not available: torch finds no device"
    if importlib.util.find_spec("triton") is None:
        return "available: torch (triton is not installed)"
    return "available: triton, torch; where installed and asked for, flash_attn_3, flash_attn_4"


def backends() -> list[Row]:
    """Every device's, and why one that is not there is not."""
    return [("cpu", cpu()), ("npu", npu()), ("cuda", cuda())]


def report() -> str:
    """The tables as text."""
    sections = {"Versions": versions(), "Devices": devices(), "Backends": backends()}
    tables = []
    for title, rows in sections.items():
        table = tabulate(rows, tablefmt="plain", disable_numparse=True)
        tables.append(f"{title}\n{textwrap.indent(table, '  ')}")
    return "\n\n".join(tables)
