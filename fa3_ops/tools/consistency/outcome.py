"""Running the comparisons, and what came out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import Tensor

from fa3_ops.tools import crew
from fa3_ops.tools.consistency.case import Case, Setting
from fa3_ops.tools.consistency.comparisons import COMPARISONS, Comparison

# The backends that promise the contract. The others are measured all the same.
PROMISED = ("cpu", "triton", "flash_attn_npu", "batch_invariant_ops")


@dataclass
class Difference:
    """How many bits of two results differ: of elements, and by how much."""

    elements: int = field(default=0, kw_only=True)
    differing: int = field(default=0, kw_only=True)
    largest: float = field(default=0.0, kw_only=True)

    def count(self, wanted: Tensor, got: Tensor) -> None:
        """Bits are compared; the same NaN on both sides is no difference."""
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            raise ValueError(
                f"expected {tuple(wanted.shape)} {wanted.dtype}, got {tuple(got.shape)} {got.dtype}"
            )
        self.elements += got.numel()
        if torch.equal(wanted, got):
            return
        wanted, got = wanted.cpu().double(), got.cpu().double()
        differs = (wanted != got) & ~(wanted.isnan() & got.isnan())
        self.differing += int(differs.sum())
        if bool(differs.any()):
            distance = (wanted - got)[differs].abs().nan_to_num(float("inf"), float("inf"))
            self.largest = max(self.largest, float(distance.max()))


@dataclass
class Outcome(Difference):
    """One comparison, in one setting or, summed up, in several."""

    comparison: Comparison
    device: str
    served: set[str] = field(default_factory=set)
    error: str = ""

    @property
    def held(self) -> bool:
        return not self.error and self.differing == 0 and self.elements > 0

    @property
    def required(self) -> bool:
        promised = self.served <= set(PROMISED)
        return promised and self.device not in self.comparison.may_differ

    @property
    def failed(self) -> bool:
        return bool(self.error) or (self.required and not self.held)

    @property
    def verdict(self) -> str:
        if self.error:
            return "error"
        if self.held:
            return "held"
        return "NOT HELD" if self.required else "differs, allowed"

    def difference(self) -> str:
        if self.error:
            return self.error
        if not self.differing:
            return ""
        return f"{self.differing / self.elements:.2%} of elements, by at most {self.largest:.1e}"

    def add(self, other: Outcome) -> None:
        self.elements += other.elements
        self.differing += other.differing
        self.largest = max(self.largest, other.largest)
        self.served |= other.served
        self.error = self.error or other.error


def run(comparison: Comparison, case: Case) -> Outcome:
    """Compares; an exception becomes the outcome's error."""
    outcome = Outcome(comparison, case.setting.device)
    try:
        if comparison.of_attention:
            assert case.expected
        case.served = set(case.expected_by) if comparison.of_attention else set()
        for wanted, got in comparison.function(case):
            outcome.count(wanted, got)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.served = set(case.served)
    return outcome


@dataclass
class Results:
    device: str
    rows: dict[str, Outcome] = field(default_factory=dict)  # by comparison, over all settings
    exceptions: list[str] = field(default_factory=list)  # what did not hold, setting by setting

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows.values()) or not self.rows

    def table(self) -> str:
        """Markdown."""
        rows = [
            (name, row.verdict, row.difference() or "-", ", ".join(sorted(row.served)) or "-")
            for name, row in self.rows.items()
        ]
        head = ("comparison", "result", "difference", "backend")
        table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
        exceptions = [f"- {line}" for line in self.exceptions]
        return "\n".join([table, "", *exceptions] if exceptions else [table])

    def summary(self) -> str:
        rows = self.rows.values()
        parts = {
            "held": sum(row.held for row in rows),
            "did not hold": sum(row.failed for row in rows),
            "differed where that is allowed": sum(not (row.held or row.failed) for row in rows),
        }
        counted = ", ".join(f"{n} {what}" for what, n in parts.items() if n)
        return f"bitwise contract on {self.device}: {counted}"


case_of = functools.cache(Case)  # of a process: expected bits are computed once


def run_task(task: tuple[int, Setting]) -> Outcome:
    number, setting = task
    return run(COMPARISONS[number], case_of(setting))


def check(chosen: Sequence[Setting], mapped: crew.Map = map) -> Results:
    """All comparisons in all settings, which are of one device."""
    results = Results(chosen[0].device)
    there = [i for i, c in enumerate(COMPARISONS) if results.device in c.devices]
    outcomes = mapped(run_task, [(i, setting) for i in there for setting in chosen])
    for comparison in (COMPARISONS[i] for i in there):
        row = results.rows[comparison.name] = Outcome(comparison, results.device)
        for setting, outcome in zip(chosen, outcomes, strict=False):
            row.add(outcome)
            if not outcome.held:
                results.exceptions.append(
                    f"{comparison.name} ({setting}): {outcome.verdict}, {outcome.difference()}"
                )
        crew.tell(results.device, f"{comparison.name}: {row.verdict}")
    case_of.cache_clear()
    return results
