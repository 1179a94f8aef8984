"""The operators, and the float64 reference itself, against the recorded kernels of an H100."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import Case, load_cases
from torch import Tensor

import fa3_ops
from fa3_ops import reference

CASES = load_cases()
SCHEDULES = ("num_splits", "pack_gqa", "max_seqlen_q", "max_seqlen_k")


def exact(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The float64 result and the arguments, whose caches the append has written."""
    arguments = {k: v for k, v in case.arguments().items() if k not in SCHEDULES}
    if case.fn == "flash_attn_with_kvcache":
        return *reference.flash_attn_with_kvcache(**arguments), arguments
    return *reference.batched(**arguments), arguments


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference; infinities must agree, then they differ by 0."""
    got = got.double()
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want).nan_to_num(0.0).abs().max())


def test_all_cases_are_there() -> None:
    assert len(CASES) == 78


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_is_as_exact_as_the_recorded_kernel(case: Case) -> None:
    out, lse, _ = exact(case)
    arguments = case.arguments()
    flag = "return_softmax_lse" if case.fn == "flash_attn_with_kvcache" else "return_attn_probs"
    got_out, got_lse = getattr(fa3_ops, case.fn)(**arguments, **{flag: True})

    assert got_out.dtype == case.outputs["out"].dtype
    assert error(got_out, out) <= 1.5 * error(case.outputs["out"], out) + 2e-3
    if not case.name.startswith("alibi_causal1"):  # FA2's LSE has another constant per row there
        assert got_lse.shape == case.outputs["softmax_lse"].shape
        assert error(got_lse, lse) <= 2 * error(case.outputs["softmax_lse"], lse) + 2e-3

    if "k_cache_after" in case.outputs:
        assert torch.equal(arguments["v_cache"], case.outputs["v_cache_after"])
        tolerance = 0.04 if "rotary_cos" in case.inputs else 0.0
        torch.testing.assert_close(
            arguments["k_cache"], case.outputs["k_cache_after"], rtol=0, atol=tolerance
        )


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
