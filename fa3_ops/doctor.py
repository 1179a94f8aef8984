"""One report to paste into an issue: `python -m fa3_ops doctor`.

What the machine has, whether the parts belong together, what the operators compute on the device
next to recorded results and to the float64 reference, and the bitwise contract. Everything is
tried: a check that raises becomes a line of the report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import consistency, info, reference
from fa3_ops.backends.npu import device as npu_device
from fa3_ops.backends.npu.capabilities import capabilities

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"  # in a checkout
DRIVER = Path("/usr/local/Ascend/driver/version.info")
PACKAGES = ("torch_npu", "flash_attn_npu", "triton-ascend", "triton", "vllm", "vllm-ascend")
VARIABLES = (
    "ASCEND_LAUNCH_BLOCKING",
    "TASK_QUEUE_ENABLE",
    "ASCEND_HOME_PATH",
    "ASCEND_TOOLKIT_HOME",
    "ASCEND_RT_VISIBLE_DEVICES",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


@dataclass
class Report:
    """Markdown, line by line, and what failed."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.lines += ["", f"## {title}", ""]

    def say(self, name: str, what: object) -> None:
        self.lines.append(f"- {name}: {what}")

    def fail(self, name: str, what: object) -> None:
        self.failures.append(name)
        self.say(name, f"FAILED: {what}")

    def attempt(self, name: str, check: Callable[[], object]) -> None:
        """Reports what check() returns, if anything, or the exception that it raised."""
        try:
            found = check()
        except Exception as error:
            self.fail(name, first_line(error))
            return
        if found is not None:
            self.say(name, found)


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_line(error: Exception) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))


# ---- What the machine has ----------------------------------------------------------------------


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


def environment(report: Report) -> None:
    names = sorted(name for name in os.environ if name.startswith("FA3NPU_"))
    values = {name: os.environ[name] for name in (*names, *VARIABLES) if name in os.environ}
    for name, value in values.items():
        report.say(name, value)
    if not values:
        report.say("variables that matter", "none is set")


# ---- Recorded calls ----------------------------------------------------------------------------

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}
SCHEDULES = ("num_splits", "pack_gqa", "max_seqlen_q", "max_seqlen_k")
FLAGS = ("return_softmax_lse", "return_attn_probs")


@dataclass
class Call:
    """One call of a function of fa3_ops, on CPU, and what a real kernel gave."""

    name: str
    function: str
    arguments: dict[str, Any]
    recorded: tuple[Tensor, Tensor] | None = None

    @property
    def flag(self) -> str:
        return FLAGS[0] if self.function == "flash_attn_with_kvcache" else FLAGS[1]


def read_safetensors(path: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The recorded cases and tensors of a file. The format is short enough to need no package."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    cases = json.loads(header.pop("__metadata__")["cases"])
    tensors = {}
    for name, entry in header.items():
        dtype, shape = SAFETENSORS[entry["dtype"]], entry["shape"]
        begin = 8 + length + entry["data_offsets"][0]
        if prod(shape) == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=begin)
            tensors[name] = tensors[name].reshape(shape)
    return cases, tensors


def recorded_calls(path: Path) -> Iterator[Call]:
    """What tests/golden/README.md describes, without the errors that real kernels made."""
    cases, tensors = read_safetensors(path)
    for case in cases:
        name = case["name"]
        if case.get("kind", "right") != "right":
            continue
        arguments = {key: tensors[f"{name}/in/{key}"] for key in case["inputs"]}
        arguments |= {key: x for key, x in case["scalars"].items() if key not in FLAGS}
        out, softmax_lse = (tensors[f"{name}/out/{key}"] for key in ("out", "softmax_lse"))
        yield Call(name, case["fn"], arguments, (out, softmax_lse))


def to(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies on the device: an append writes into its own."""
    return {
        name: x.clone().to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()
    }


def exact(call: Call) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The float64 results, and the arguments, whose caches an append has written."""
    arguments = {k: x for k, x in to("cpu", call.arguments).items() if k not in SCHEDULES}
    if call.function == "flash_attn_with_kvcache":
        return *reference.flash_attn_with_kvcache(**arguments), arguments
    return *reference.batched(**arguments), arguments


def largest_error(got: Tensor, want: Tensor) -> float:
    """Infinite where one side is infinite or NaN and the other is not."""
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    got, want = got.cpu().double(), want.double()
    agree = (got == want) | (got.isinf() & want.isinf())
    if got.numel() == 0:
        return 0.0
    distance = (got - want).abs().masked_fill(agree, 0.0)
    return float(distance.nan_to_num(float("inf"), float("inf")).max())


def tolerated(call: Call, want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of out and softmax_lse: next to a recorded kernel its own error, else what rounding costs."""
    if call.recorded is not None:
        out, softmax_lse = map(largest_error, call.recorded, want)
        unlike = call.name.startswith("alibi_causal1")  # FA2's LSE has another constant per row
        return 1.5 * out + 2e-3, float("inf") if unlike else 2 * softmax_lse + 2e-3
    return {torch.float32: 2e-4, torch.float16: 6e-3}.get(call.arguments["q"].dtype, 4e-2), 5e-3


def attempt_call(call: Call, device: str) -> tuple[str, str]:
    """The backend that served the call on the device, and what is wrong with its results."""
    function = getattr(fa3_ops, call.function)
    backend = "no backend"
    try:
        arguments = to(device, call.arguments) | {call.flag: True}
        steps = fa3_ops.explain(function, **arguments).steps
        backend = consistency.attention_step(steps).backend
        out, softmax_lse = function(**arguments)
        *want, written = exact(call)
        most, most_lse = tolerated(call, (want[0], want[1]))
        wrong = []
        for name, got, wanted, most_error in (
            ("out", out, want[0], most),
            ("softmax_lse", softmax_lse, want[1], most_lse),
        ):
            if (found := largest_error(got, wanted)) > most_error:
                wrong.append(f"{name} errs by {found:.1e}, tolerated {most_error:.1e}")
        for name in ("k_cache", "v_cache"):
            if "k" not in call.arguments or name not in written:
                continue
            rotated = name == "k_cache" and "rotary_cos" in call.arguments
            if (found := largest_error(arguments[name], written[name])) > (0.04 if rotated else 0):
                wrong.append(f"{name} differs by {found:.1e} after the append")
        return backend, ", ".join(wrong)
    except Exception as error:
        return backend, first_line(error)


def check_calls(report: Report, title: str, calls: list[Call], device: str) -> Counter[str]:
    """One line for all, one more for each that is wrong; returns how many each backend served."""
    served: Counter[str] = Counter()
    wrong = []
    for call in calls:
        backend, what = attempt_call(call, device)
        served[backend] += 1
        if what:
            wrong.append((f"{title}, {call.name} ({backend})", what))
    right = f"{len(calls) - len(wrong)} of {len(calls)} right"
    report.say(title, f"{right}, served by {counted(served)}")
    for name, what in wrong:
        report.fail(name, what)
    return served


def counted(served: Counter[str]) -> str:
    return ", ".join(f"{backend} ({n})" for backend, n in served.most_common()) or "nothing"


# ---- Calls that need no file -------------------------------------------------------------------


def built_in_calls(dtype: torch.dtype) -> list[Call]:
    """A dozen features, small."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(to)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    dense = {"q": rand(2, 9, 4, 64), "k": rand(2, 40, 2, 64), "v": rand(2, 40, 2, 64)}
    packed = {
        "q": rand(12, 4, 64),
        "k": rand(45, 2, 64),
        "v": rand(45, 2, 64),
        "cu_seqlens_q": ints(0, 5, 5, 12),
        "cu_seqlens_k": ints(0, 5, 20, 45),
        "max_seqlen_q": 7,
        "max_seqlen_k": 25,
    }
    cache = {"q": rand(2, 3, 4, 64), "k_cache": rand(2, 50, 2, 64), "v_cache": rand(2, 50, 2, 64)}
    cache |= {"cache_seqlens": ints(40, 17)}
    new = {"k": rand(2, 3, 2, 64), "v": rand(2, 3, 2, 64)}
    paged = cache | {
        "k_cache": rand(8, 16, 2, 64),
        "v_cache": rand(8, 16, 2, 64),
        "page_table": ints(3, 7, 1, 0, 4, 2).view(2, 3),
    }
    angles = torch.arange(64)[:, None] * 0.1 ** torch.arange(0, 1, 1 / 16)
    rotary = {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    causal = {"causal": True}
    f8 = torch.float8_e4m3fn
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "dense, GQA": ("flash_attn_func", dense),
        "causal": ("flash_attn_func", dense | causal),
        "window": ("flash_attn_func", dense | {"window_size": (5, 0)}),
        "softcap": ("flash_attn_func", dense | causal | {"softcap": 3.0}),
        "sinks": ("flash_attn_func", dense | causal | {"sinks": rand(4, to=torch.float32)}),
        "ALiBi": ("flash_attn_func", dense | causal | {"alibi_slopes": torch.rand(4)}),
        "qv": ("flash_attn_func", dense | causal | {"qv": rand(2, 9, 4, 64)}),
        "FP8": ("flash_attn_func", {k: x.to(f8) for k, x in dense.items()} | causal),
        "packed": ("flash_attn_varlen_func", packed | causal),
        "cache": ("flash_attn_with_kvcache", cache | causal),
        "left padding": ("flash_attn_with_kvcache", cache | {"cache_leftpad": ints(3, 17)}),
        "batch index": ("flash_attn_with_kvcache", cache | {"cache_batch_idx": ints(1, 0)}),
        "pages, append, rotary": ("flash_attn_with_kvcache", paged | new | rotary | causal),
    }
    return [Call(name, function, arguments) for name, (function, arguments) in calls.items()]


def gradients(device: str, dtype: torch.dtype) -> str:
    """dq, dk, dv next to autograd through the reference."""
    call = built_in_calls(dtype)[1]
    inputs = {k: x for k, x in call.arguments.items() if k != "causal"}
    got = {k: x.to(device, copy=True).requires_grad_() for k, x in inputs.items()}
    want = {k: x.to(torch.float64, copy=True).requires_grad_() for k, x in inputs.items()}
    out = fa3_ops.flash_attn_func(**got, causal=True)
    assert isinstance(out, Tensor)
    wanted, _ = reference.batched(**want, causal=True)
    dout = torch.ones_like(out)
    out.backward(dout)
    wanted.backward(torch.ones_like(wanted))
    worst = 0.0
    for name in ("q", "k", "v"):
        ours, theirs = got[name].grad, want[name].grad
        assert ours is not None
        assert theirs is not None
        worst = max(worst, largest_error(ours, theirs) / max(float(theirs.abs().max()), 1.0))
    if worst > 2e-2:
        raise ValueError(f"gradients err by {worst:.1e} of the largest one, tolerated 2e-2")
    with torch.no_grad():
        served = fa3_ops.explain(
            torch.ops.fa3npu.flash_attn_func_backward,
            *(dout, got["q"], got["k"], got["v"], out),
            torch.zeros(2, 4, 9, device=device),
        ).backend
    return f"right (largest relative error {worst:.1e}), served by {served}"


# ---- The report --------------------------------------------------------------------------------


def numbers(report: Report, device: str, golden: Path) -> Counter[str]:
    served: Counter[str] = Counter()
    files = sorted(golden.glob("*.safetensors"))
    if not files:
        report.say(
            "recorded calls",
            f"none in {golden}; for them, run this in a checkout of fa3_ops, or pass its "
            "tests/golden as --golden",
        )
    for path in files:
        report.attempt(
            f"recorded calls, {path.name}",
            lambda path=path: served.update(  # type: ignore[misc]
                check_calls(report, path.name, list(recorded_calls(path)), device)
            ),
        )
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        report.attempt(
            f"built-in calls, {name}",
            lambda dtype=dtype, name=name: served.update(  # type: ignore[misc]
                check_calls(report, f"built-in, {name}", built_in_calls(dtype), device)
            ),
        )
        report.attempt(
            f"gradients, {name}",
            lambda dtype=dtype: gradients(device, dtype),  # type: ignore[misc]
        )
    return served


def bits(report: Report, device: str) -> None:
    results = consistency.check(consistency.settings(device))
    report.lines += [results.table(), ""]
    report.say("summary", results.summary())
    report.failures += [name for name, row in results.rows.items() if row.failed]


def examine(device: str | None, golden: Path) -> Report:
    report = Report(["# fa3_ops doctor"])
    missing = import_torch_npu()
    device = device or ("cpu" if missing else "npu")
    for title, check in (
        ("Versions", versions),
        ("Driver and CANN", driver),
        ("Environment", environment),
    ):
        report.section(title)
        report.attempt(title, lambda check=check: check(report))  # type: ignore[misc]
    report.section("NPU")
    if missing:
        report.say("no NPU here", missing)
        if device == "npu" or importlib.util.find_spec("torch_npu") is not None:
            report.failures.append("NPU")
    else:
        npu(report)

    served: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report.section(f"Results on {device}")
        report.attempt("results", lambda: served.update(numbers(report, device, golden)))
        report.section(f"Bitwise contract on {device}")
        report.attempt("bitwise contract", lambda: bits(report, device))
    fallbacks = sorted(
        {
            one_line(str(w.message))
            for w in caught
            if issubclass(w.category, fa3_ops.FallbackWarning)
        }
    )
    if fallbacks:
        report.section("Fallbacks")
        report.lines += [f"- {text}" for text in fallbacks]
    report.lines += ["", verdict(report, device, served)]
    return report


def verdict(report: Report, device: str, served: Counter[str]) -> str:
    if report.failures:
        return (
            f"**Verdict: {len(report.failures)} failed on {device}: {', '.join(report.failures)}**"
        )
    return f"**Verdict: all right on {device}; calls served by {counted(served)}**"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "npu"), default=None)
    parser.add_argument(
        "--golden", type=Path, default=GOLDEN, help="folder of recorded calls (tests/golden)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Prints the report; 1 if anything failed."""
    report = examine(arguments.device, arguments.golden)
    print("\n".join(report.lines))
    return int(bool(report.failures))
