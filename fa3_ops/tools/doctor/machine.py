"""What the machine has, and whether the parts belong together."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fa3_ops
from fa3_ops.backends.cuda import flash_attn_3, flash_attn_4
from fa3_ops.backends.cuda.flash_attention import Package
from fa3_ops.backends.npu import device as npu_device
from fa3_ops.backends.npu.capabilities import capabilities
from fa3_ops.tools import info
from fa3_ops.tools.doctor.report import Report, one_line

DRIVER = Path("/usr/local/Ascend/driver/version.info")
PACKAGES = (
    *("torch_npu", "flash_attn_npu", "triton-ascend", "triton"),
    *("flash_attn_3", "fa3_fwd", "flash-attn-4", "nvidia-cutlass-dsl", "vllm", "vllm-ascend"),
)
VARIABLES = (
    "ASCEND_LAUNCH_BLOCKING",
    "TASK_QUEUE_ENABLE",
    "ASCEND_HOME_PATH",
    "ASCEND_TOOLKIT_HOME",
    "ASCEND_RT_VISIBLE_DEVICES",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def import_torch_npu() -> str | None:
    """Why there is no NPU for torch; None if there is one."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if "torch_npu" not in sys.modules and (why := import_elsewhere("torch_npu")):
        if torch.version.cuda is not None:
            why += f"; torch {torch.__version__} is a CUDA build, torch_npu wants a CPU build"
        return f"torch_npu does not import: {why}"
    torch_npu = importlib.import_module("torch_npu")
    return None if torch_npu.npu.is_available() else "torch_npu finds no device"


def import_elsewhere(module: str) -> str | None:
    """Why a process that imports the module fails; it may abort, which would end this one."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    tried = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        env=os.environ | path,
        check=False,
    )
    if tried.returncode == 0:
        return None
    lines = [one_line(line) for line in tried.stderr.splitlines() if line.strip()]
    thrown = [line.removeprefix("what(): ") for line in lines if line.startswith("what(): ")]
    said = (thrown or lines[-1:] or ["without a word"])[0]
    if tried.returncode > 0:
        return said
    return f"its process ends with {signal.Signals(-tried.returncode).name}: {said}"


def versions(report: Report) -> None:
    report.say("system", f"{platform.platform()}, python {platform.python_version()}")
    report.say("fa3_ops", fa3_ops.__version__)
    report.say("torch", torch.__version__)
    for package in PACKAGES:
        report.say(package, info.version(package))
    report.attempt("torch and torch_npu", belong_together)
    if "cann_emulator" in sys.modules:
        report.say("CANN", "EMULATED: no NPU computes anything of this report")


def belong_together() -> str | None:
    """torch_npu x.y.z is built for torch x.y.z."""
    found = info.version("torch_npu")
    if found == "not installed":
        return None
    numbers, wanted = (".".join(v.split("+")[0].split(".")[:3]) for v in (found, torch.__version__))
    if numbers != wanted:
        raise RuntimeError(f"torch_npu {found} is built for torch {numbers}, not {wanted}")
    return "belong together"


def driver(report: Report) -> None:
    report.attempt("driver", driver_version)
    report.attempt("npu-smi", npu_smi)
    report.attempt("CANN", cann_version)
    if "torch_npu" in sys.modules:
        report.attempt("CANN, as torch_npu sees it", cann_of_torch_npu)


def driver_version() -> str:
    return version_lines(DRIVER) if DRIVER.exists() else f"no {DRIVER}"


def version_lines(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return ", ".join([line.strip() for line in lines if "version" in line.lower()][:4])


def npu_smi() -> str:
    if shutil.which("npu-smi") is None:
        return "not on PATH"
    printed = subprocess.run(
        ["npu-smi", "info"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return "\n\n```\n" + printed.rstrip() + "\n```\n"


def cann_version() -> str:
    homes = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    home = next((Path(home) for home in homes if home), None)
    if home is None:
        return "neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set (source CANN's set_env.sh)"
    patterns = ("ascend_*_install.info", "*/ascend_*_install.info", "version.cfg", "version.info")
    for pattern in patterns:
        for path in sorted(home.glob(pattern)):
            return f"{version_lines(path)} ({path})"
    return f"no version file in {home}"


def cann_of_torch_npu() -> str:
    version: str = importlib.import_module("torch_npu.npu.utils").get_cann_version("CANN")
    return version or "unknown"


def npu(report: Report) -> None:
    report.attempt("device", kernel_tables)
    report.attempt("flash_attn_npu", flash_attn_npu)


def kernel_tables() -> str:
    name = npu_device.soc_name()
    if name.startswith("Ascend910"):
        return f"{name}: the tables of 910"
    if npu_device.is_950():
        return f"{name}: the tables of 950"
    return f"{name}: neither a 910 nor a 950, which are all that fa3_ops knows; it is taken for 910"


def flash_attn_npu() -> str:
    found = npu_device.kernel()
    if isinstance(found, str):
        if info.version("flash_attn_npu") != "not installed":
            raise RuntimeError(one_line(found))
        return found
    version = ".".join(map(str, found.version))
    return f"{version}, module {found.module.__name__}, table: {capabilities(found).name}"


def no_gpu() -> str | None:
    """Why there is no GPU for torch; None if there is one."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no device"


def cuda(report: Report) -> None:
    report.say("CUDA of torch", torch.version.cuda)
    report.attempt("driver", cuda_driver)
    for i in range(torch.cuda.device_count()):
        report.attempt(f"cuda:{i}", gpu, i)
    for backend, package, distributions in (
        ("flash_attn_3", flash_attn_3.package, ("flash_attn_3", "fa3_fwd")),
        ("flash_attn_4", flash_attn_4.package, ("flash-attn-4",)),
    ):
        report.attempt(f"backend {backend}", flash_attention, package, distributions)


def cuda_driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not on PATH"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    printed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    return ", ".join(dict.fromkeys(printed.split()))


def gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.multi_processor_count} processors, {found.total_memory / 2**30:.0f} GiB"
    )


def flash_attention(package: Callable[[], Package | str], distributions: Sequence[str]) -> str:
    found = package()
    if isinstance(found, Package):
        return f"{found.can.name} {found.version}"
    if any(info.version(name) != "not installed" for name in distributions):
        raise RuntimeError(one_line(found))
    return found


def environment(report: Report) -> None:
    names = sorted(name for name in os.environ if name.startswith("FA3NPU_"))
    values = {name: os.environ[name] for name in (*names, *VARIABLES) if name in os.environ}
    for name, value in values.items():
        report.say(name, value)
    if not values:
        report.say("variables that matter", "none is set")
