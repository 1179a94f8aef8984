"""torch.library.opcheck on the samples of every operator; one without a sample fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fa3_ops.testing
from fa3_ops.testing import sample_calls, samples

ops = torch.ops.fa3npu
NAMES = [call.name for call in sample_calls()]
NO_SAMPLE = {"cpu_capability", "cpu_capabilities"}  # opcheck asks for a tensor argument
NO_SAMPLE |= {"no_gradient"}  # raises, whatever it gets: tests/test_autograd.py


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    (call,) = (call for call in sample_calls() if call.name == name)
    results = torch.library.opcheck(
        call.operator, call.args, call.kwargs, test_utils=call.test_utils
    )
    assert set(results.values()) == {"SUCCESS"}
    eight = any(getattr(x, "dtype", None) in samples.FLOAT8 for x in call.args)
    assert len(results) == (3 if eight else 4)


def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leaves two operators, and notes every operator that opcheck is called with."""
    checked: list[str] = []
    opcheck = torch.library.opcheck

    def noted(op: Any, *args: Any, **kwargs: Any) -> Any:
        checked.append(op._opname)
        return opcheck(op, *args, **kwargs)

    chosen = (ops.flash_attn_func_backward.default, ops.flash_attn_kvcache.out)
    monkeypatch.setattr(samples, "SAMPLES", {op: samples.SAMPLES[op] for op in chosen})
    monkeypatch.setattr(torch.library, "opcheck", noted)
    return checked


def test_the_lines_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = few(monkeypatch)
    assert fa3_ops.testing.__doc__ is not None
    loop = re.search(r"for call in sample_calls.*?(?=\n\n)", fa3_ops.testing.__doc__, re.DOTALL)
    assert loop is not None
    exec(loop[0], vars(fa3_ops.testing) | {"torch": torch, "device": "cpu"})
    assert checked == [*["flash_attn_func_backward"] * 3, "flash_attn_kvcache"]


def test_every_operator_has_a_sample() -> None:
    names = {
        (name, overload or "default")
        for qualified in torch._C._dispatch_get_all_op_names()
        if qualified.startswith("fa3npu::")
        for name, _, overload in [qualified.removeprefix("fa3npu::").partition(".")]
    }
    sampled = {(call.operator._opname, call.operator._overloadname) for call in sample_calls()}
    assert {n for n in names if n[0] not in NO_SAMPLE} == sampled
