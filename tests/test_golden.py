"""The operators, and the float64 reference itself, against the recorded kernels of an H100."""

from __future__ import annotations

import pytest
import torch
from golden_cases import Case, check, error, exact, load_cases

import fa3_ops

CASES = load_cases()


def test_all_cases_are_there() -> None:
    assert len(CASES) == 78


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_is_as_exact_as_the_recorded_kernel(case: Case) -> None:
    arguments = case.arguments()
    out, softmax_lse = getattr(fa3_ops, case.fn)(**arguments, **case.wants_lse)
    check(case, out, softmax_lse, arguments)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_means_what_the_recorded_kernel_did(case: Case) -> None:
    out, lse, arguments = exact(case)
    fp8 = case.inputs["q"].dtype == torch.float8_e4m3fn
    assert error(case.outputs["out"], out) <= (0.15 if fp8 else 0.02)
    if not case.name.startswith("alibi_causal1"):
        assert error(case.outputs["softmax_lse"], lse) <= 0.02
    if "k_cache_after" in case.outputs:
        torch.testing.assert_close(
            arguments["k_cache"], case.outputs["k_cache_after"], rtol=0, atol=0.04
        )
        assert torch.equal(arguments["v_cache"], case.outputs["v_cache_after"])
