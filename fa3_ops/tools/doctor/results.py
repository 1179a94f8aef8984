"""What the operators compute on the device."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fa3_ops
from fa3_ops.testing import FunctionCall, SampleCall, recorded_calls, sample_calls
from fa3_ops.tools import consistency, crew
from fa3_ops.tools.doctor.built_in import built_in_calls, gradients
from fa3_ops.tools.doctor.report import Report, first_line


def numbers(
    report: Report, device: str, golden: Path | None, served: Counter[str], mapped: crew.Map
) -> None:
    """Next to recorded kernels and to the float64 reference; counts what each backend served."""
    files = sorted(golden.glob("*.safetensors")) if golden is not None else []
    if golden is None:
        report.say("recorded calls", "left out: each compiles kernels; --golden FOLDER runs them")
    elif not files:
        report.say(
            "recorded calls",
            f"none in {golden}; for them, run this in a checkout of fa3_ops, or pass its "
            "tests/golden as --golden",
        )
    for path in files:
        report.attempt(
            *(f"recorded calls, {path.name}", check_calls),
            *(report, path.name, right_calls, path, device, served, mapped),
        )
    dtypes = (torch.float16, torch.bfloat16)
    errors = [mapped(functools.partial(gradients, device), [dtype]) for dtype in dtypes]
    for dtype, error in zip(dtypes, errors, strict=True):
        name = str(dtype).removeprefix("torch.")
        report.attempt(
            *(f"built-in calls, {name}", check_calls),
            *(report, f"built-in, {name}", built_in_calls, dtype, device, served, mapped),
        )
        report.attempt(f"gradients, {name}", next, error)


def right_calls(path: Path) -> list[FunctionCall]:
    """Without the errors that real kernels made."""
    return [call for call in recorded_calls(path) if call.kind == "right"]


@functools.cache  # in each process of a crew
def listed(calls_of: Callable[..., Any], *arguments: Any) -> list[Any]:
    return list(calls_of(*arguments))


def check_calls(
    report: Report,
    title: str,
    calls_of: Callable[[Any], list[FunctionCall]],
    of: object,
    device: str,
    served: Counter[str],
    mapped: crew.Map,
) -> None:
    """The calls of a file or dtype."""
    here: Counter[str] = Counter()
    wrong = {}
    calls = calls_of(of)
    attempt = functools.partial(attempt_one, calls_of, of, device)
    for call, (backend, what) in zip(calls, mapped(attempt, range(len(calls))), strict=True):
        here[backend] += 1
        if what:
            wrong[f"{call.name} ({backend})"] = what
    report.judged(title, len(calls), wrong, f", served by {counted(here)}")
    served.update(here)


def attempt_one(
    calls_of: Callable[[Any], list[FunctionCall]], of: object, device: str, number: int
) -> tuple[str, str]:
    return attempt_call(listed(calls_of, of)[number], device)


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


def samples(device: str) -> list[SampleCall]:
    """Of every operator; where kernels are compiled for each, its first."""
    calls = sample_calls(device, torch.float16)
    return [call for call in calls if not crew.compiles(device) or call.name.endswith("-0")]


def opcheck(report: Report, device: str, mapped: crew.Map) -> None:
    """Schemas, fake kernels and gradients of every operator, by PyTorch's own tests."""
    names = [call.name for call in samples(device)]
    attempt = functools.partial(attempt_sample, device)
    with warnings.catch_warnings():  # the samples are odd on purpose
        warnings.simplefilter("ignore", fa3_ops.FallbackWarning)
        reasons = dict(zip(names, mapped(attempt, range(len(names))), strict=True))
    report.judged("opcheck", len(reasons), {name: why for name, why in reasons.items() if why})


def attempt_sample(device: str, number: int) -> str:
    return attempt_opcheck(listed(samples, device)[number])


def attempt_opcheck(call: SampleCall) -> str:
    """What is wrong with it."""
    try:
        torch.library.opcheck(call.operator, call.args, call.kwargs, test_utils=call.test_utils)
    except Exception as error:
        return first_line(error)
    return ""


def bits(report: Report, device: str, mapped: crew.Map) -> None:
    """All of the contract; where kernels are compiled, in one setting."""
    chosen = consistency.settings(device)
    if crew.compiles(device):
        chosen = [setting for setting in chosen if setting.dtype == torch.bfloat16][:1]
        report.write(
            f"Of {chosen[0]}; `python -m fa3_ops consistency` has all dtypes and masks.", ""
        )
    results = consistency.check(chosen, mapped)
    report.write(results.table(), "")
    report.say("summary", results.summary())
    report.failures += [name for name, row in results.rows.items() if row.failed]
