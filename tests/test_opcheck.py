"""torch.library.opcheck, all four utilities, on every operator; one without a sample fails."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import SAMPLES, flash_attn_func_fp8

CALLS = [(op, i) for op, samples in SAMPLES.items() for i, _ in enumerate(samples())]
NO_SAMPLE = {"cpu_capability", "cpu_capabilities"}  # opcheck asks for a tensor argument
NO_SAMPLE |= {"no_gradient"}  # raises, whatever it gets: tests/test_autograd.py


@pytest.mark.parametrize(("op", "index"), CALLS, ids=lambda x: str(x).removeprefix("fa3npu."))
def test_opcheck(op: torch._ops.OpOverload, index: int) -> None:
    torch.manual_seed(0)
    args, kwargs = list(SAMPLES[op]())[index]
    results = torch.library.opcheck(op, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_opcheck_fp8() -> None:
    """All but the schema check, which compares inputs by arithmetic that float8 lacks."""
    args, kwargs = next(flash_attn_func_fp8())
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(
        torch.ops.fa3npu.flash_attn_func.default, args, kwargs, test_utils=utilities
    )
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_has_a_sample() -> None:
    names = {
        (name, overload or "default")
        for qualified in torch._C._dispatch_get_all_op_names()
        if qualified.startswith("fa3npu::")
        for name, _, overload in [qualified.removeprefix("fa3npu::").partition(".")]
    }
    sampled = {(op._opname, op._overloadname) for op in SAMPLES}
    assert {n for n in names if n[0] not in NO_SAMPLE} == sampled
