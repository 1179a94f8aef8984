"""What the operators compute on the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

import fa3_ops
from fa3_ops.testing import FunctionCall, SampleCall, recorded_calls
from fa3_ops.tools import consistency
from fa3_ops.tools.doctor.built_in import built_in_calls, gradients
from fa3_ops.tools.doctor.report import Report, first_line


def numbers(report: Report, device: str, golden: Path, served: Counter[str]) -> None:
    """Next to recorded kernels and to the float64 reference; counts what each backend served."""
    files = sorted(golden.glob("*.safetensors"))
    if not files:
        report.say(
            "recorded calls",
            f"none in {golden}; for them, run this in a checkout of fa3_ops, or pass its "
            "tests/golden as --golden",
        )
    for path in files:
        report.attempt(f"recorded calls, {path.name}", check_recorded, report, path, device, served)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        calls = built_in_calls(dtype)
        report.attempt(
            *(f"built-in calls, {name}", check_calls),
            *(report, f"built-in, {name}", calls, device, served),
        )
        report.attempt(f"gradients, {name}", gradients, device, dtype)


def right_calls(path: Path) -> list[FunctionCall]:
    """Without the errors that real kernels made."""
    return [call for call in recorded_calls(path) if call.kind == "right"]


def check_recorded(report: Report, path: Path, device: str, served: Counter[str]) -> None:
    check_calls(report, path.name, right_calls(path), device, served)


def check_calls(
    report: Report, title: str, calls: list[FunctionCall], device: str, served: Counter[str]
) -> None:
    here: Counter[str] = Counter()
    wrong = {}
    for call in calls:
        backend, what = attempt_call(call, device)
        here[backend] += 1
        if what:
            wrong[f"{call.name} ({backend})"] = what
    report.judged(title, len(calls), wrong, f", served by {counted(here)}")
    served.update(here)


def attempt_call(call: FunctionCall, device: str) -> tuple[str, str]:
    """The backend that served the call on the device, and what is wrong with its results."""
    backend = "no backend"
    try:
        arguments = call.fresh(device)
        backend = fa3_ops.explain(call.function, **arguments).backend
        out, softmax_lse = call.function(**arguments)
        return backend, ", ".join(call.disagreements(out, softmax_lse, arguments))
    except Exception as error:
        return backend, first_line(error)


def counted(served: Counter[str]) -> str:
    return ", ".join(f"{backend} ({n})" for backend, n in served.most_common()) or "nothing"


def opcheck(report: Report, calls: Iterable[SampleCall]) -> None:
    """Schemas, fake kernels and gradients of every operator, by PyTorch's own tests."""
    with warnings.catch_warnings():  # the samples are odd on purpose
        warnings.simplefilter("ignore", fa3_ops.FallbackWarning)
        reasons = {call.name: attempt_opcheck(call) for call in calls}
    report.judged("opcheck", len(reasons), {name: why for name, why in reasons.items() if why})


def attempt_opcheck(call: SampleCall) -> str:
    """What is wrong with it."""
    try:
        torch.library.opcheck(call.operator, call.args, call.kwargs, test_utils=call.test_utils)
    except Exception as error:
        return first_line(error)
    return ""


def bits(report: Report, device: str) -> None:
    results = consistency.check(consistency.settings(device))
    report.lines += [results.table(), ""]
    report.say("summary", results.summary())
    report.failures += [name for name, row in results.rows.items() if row.failed]
