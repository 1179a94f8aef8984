"""One report to paste into an issue: `python -m fa3_ops doctor`.

What the machine has, whether the parts belong together, what the operators compute on the device
next to recorded results and to the float64 reference, the bitwise contract, and PyTorch's tests of
their registration. Everything is tried: a check that raises becomes a line of the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections import Counter
from pathlib import Path

import fa3_ops
from fa3_ops.tools import crew
from fa3_ops.tools.doctor import machine, results
from fa3_ops.tools.doctor.report import Report, one_line

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"  # in a checkout


def examine(device: str | None, golden: Path | None, processes: int | None) -> Report:
    report = Report()
    report.write("# fa3_ops doctor")
    no_npu, no_gpu = machine.import_torch_npu(), machine.no_gpu()
    device = device or ("npu" if no_npu is None else "cuda" if no_gpu is None else "cpu")
    for title, check in (
        ("Versions", machine.versions),
        ("Driver and CANN", machine.driver),
        ("Environment", machine.environment),
    ):
        report.section(title)
        report.attempt(title, check, report)
    wanted = {device, "npu"} if importlib.util.find_spec("torch_npu") else {device}
    for title, name, missing, examine_it in (
        ("NPU", "npu", no_npu, machine.npu),
        ("CUDA", "cuda", no_gpu, machine.cuda),
    ):
        report.section(title)
        if missing is None:
            examine_it(report)
            continue
        report.say(f"no {title} here", missing)
        if name in wanted:
            report.failures.append(title)
    if golden is None and not crew.compiles(device):
        golden = GOLDEN
    with crew.crew(device, processes) as mapped:
        served = compute(report, device, golden, mapped)
    report.write("", verdict(report, device, served))
    return report


def compute(report: Report, device: str, golden: Path | None, mapped: crew.Map) -> Counter[str]:
    """Everything that runs operators; how many calls each backend served."""
    served: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report.section(f"Results on {device}")
        report.attempt("results", results.numbers, report, device, golden, served, mapped)
        report.section(f"Bitwise contract on {device}")
        report.attempt("bitwise contract", results.bits, report, device, mapped)
        report.section(f"Registration on {device}")
        report.attempt("opcheck", results.opcheck, report, device, mapped)
    results.listed.cache_clear()
    fallbacks = {
        one_line(str(w.message)) for w in caught if issubclass(w.category, fa3_ops.FallbackWarning)
    }
    if fallbacks:
        report.section("Fallbacks")
        report.write(*(f"- {text}" for text in sorted(fallbacks)))
    return served


def verdict(report: Report, device: str, served: Counter[str]) -> str:
    if report.failures:
        return (
            f"**Verdict: {len(report.failures)} failed on {device}: {', '.join(report.failures)}**"
        )
    return f"**Verdict: all right on {device}; calls served by {results.counted(served)}**"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "npu", "cuda"), default=None)
    parser.add_argument(
        "--golden",
        type=Path,
        default=None,
        help="folder of recorded calls; that of a checkout, but where each compiles kernels",
    )
    crew.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Prints the report; 1 if anything failed."""
    report = examine(arguments.device, arguments.golden, arguments.processes)
    return int(bool(report.failures))
