"""The bitwise contract on CPU, and that `python -m fa3_ops consistency` sees a broken one."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

import fa3_ops
from fa3_ops import __main__
from fa3_ops.tools import consistency
from fa3_ops.tools.consistency.case import Case, Setting
from fa3_ops.tools.consistency.comparisons import COMPARISONS, Comparison
from fa3_ops.tools.consistency.outcome import Outcome, run

SMALL = Setting("cpu", torch.float32, 16, seqlens=(5, 1, 150, 9))
case_of = functools.cache(Case)  # one set of expected bits for all comparisons of a setting


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.name)
@pytest.mark.parametrize("setting", consistency.settings("cpu"), ids=str)
def test_contract_holds(setting: Setting, comparison: Comparison) -> None:
    outcome = run(comparison, case_of(setting))
    assert outcome.held, outcome.difference()
    assert outcome.required
    assert outcome.served == {"cpu"}


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.name)
def test_every_comparison_computes_something_of_its_own(comparison: Comparison) -> None:
    """No comparison is a result compared with itself: 0 in place of the expected bits shows."""
    case = Case(SMALL)
    case.expected = [(torch.zeros_like(out), lse) for out, lse in case.expected]
    outcome = run(comparison, case)
    assert outcome.held == (not comparison.of_attention)
    assert (outcome.differing > 0) == comparison.of_attention


def small(device: str, dtypes: Any = None) -> list[Setting]:
    return [SMALL]


def broken(function: Any) -> Any:
    """The function with a result that depends on the batch size."""

    def wrapper(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, softmax_lse = function(q, *args, **kwargs)
        lengths = args[2] if len(args) > 2 else None
        if lengths is not None and len(lengths) > 3:
            out[0, 0] += 2.0**-10
        return out, softmax_lse

    return wrapper


def unpadded(table: str) -> str:
    return re.sub(" +", " ", table)


def test_a_broken_operator_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(consistency, "settings", small)
    assert __main__.main(["consistency", "--device", "cpu"]) == 0
    assert "15 held" in capsys.readouterr().out

    monkeypatch.setattr(fa3_ops, "flash_attn_varlen_func", broken(fa3_ops.flash_attn_varlen_func))
    assert __main__.main(["consistency", "--device", "cpu"]) == 1
    printed = unpadded(capsys.readouterr().out)
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if "|" in line}
    assert "| NOT HELD | " in rows["alone or in any batch"]
    assert "by at most 9.8e-04" in rows["alone or in any batch"]
    assert "| held | - | cpu |" in rows["decode token by token"]
    assert "alone or in any batch (float32, headdim 16, causal): NOT HELD" in printed
    assert "11 held, 4 did not hold" in printed


def test_an_exception_becomes_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(consistency, "settings", small)
    monkeypatch.setattr(fa3_ops, "flash_attn_with_kvcache", refuse)
    assert __main__.main(["consistency", "--device", "cpu"]) == 1
    printed = unpadded(capsys.readouterr().out)
    assert "| whole prefill | error | RuntimeError: no such kernel |" in printed
    assert "second line" not in printed
    assert "| alone or in any batch | held |" in printed


def test_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def empty(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("no driver\nstack")

    monkeypatch.setattr(torch, "empty", empty)
    assert __main__.main(["consistency", "--device", "cuda"]) == 1
    assert capsys.readouterr().out == "no device cuda here: RuntimeError: no driver\n"


def splits(device: str, backend: str) -> Outcome:
    comparison = next(c for c in COMPARISONS if c.name == "num_splits above 1")
    return Outcome(comparison, device, elements=100, differing=3, largest=1e-5, served={backend})


def test_what_may_differ() -> None:
    """Splits on NPU, and whatever a backend serves that promises nothing."""
    npu = splits("npu", "flash_attn_npu")
    assert (npu.verdict, npu.failed) == ("differs, allowed", False)
    assert npu.difference() == "3.00% of elements, by at most 1.0e-05"
    assert splits("cpu", "cpu").failed
    batch = Outcome(COMPARISONS[1], "npu", elements=100, differing=1, served={"flash_attn_npu"})
    assert batch.failed
    batch.served = {"flash_attn_npu", "torch"}
    assert (batch.verdict, batch.failed) == ("differs, allowed", False)
    batch.error = "RuntimeError: no"
    assert batch.failed


def test_bits_are_compared() -> None:
    outcome = Outcome(COMPARISONS[0], "cpu")
    nan, infinity = float("nan"), float("inf")
    outcome.count(torch.tensor([1.0, nan, infinity]), torch.tensor([1.0, nan, infinity]))
    assert outcome.held
    outcome.count(torch.tensor([1.0, infinity]), torch.tensor([1.0, -infinity]))
    assert (outcome.elements, outcome.differing, outcome.largest) == (5, 1, infinity)
    with pytest.raises(ValueError, match="expected"):
        outcome.count(torch.zeros(2), torch.zeros(3))


def test_nothing_compared_is_not_held() -> None:
    assert run(Comparison("nothing", lambda case: iter(())), Case(SMALL)).failed


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    assert run(next(c for c in COMPARISONS if "threads" in c.name), Case(SMALL)).held
    assert torch.get_num_threads() == before


def test_a_linear_of_another_order_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (comparison,) = (c for c in COMPARISONS if "linear" in c.name)
    monkeypatch.setattr(fa3_ops, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(Case, "call", lambda self, f, *arguments: f(*arguments))
    outcome = run(comparison, Case(Setting("cpu", torch.float32, 64)))
    assert outcome.differing > 0


def test_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--device", "cpu", "--dtype", "bfloat16", "--processes", "2")
    assert __main__.main(["consistency", *arguments]) == 0
    assert "bitwise contract on cpu: 15 held" in capsys.readouterr().out
