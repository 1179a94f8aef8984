"""The operators, and the float64 reference itself, against the recorded kernels of an H100."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fa3_ops.testing import FunctionCall, recorded_calls
from fa3_ops.testing.recordings import largest_error, read_safetensors

FOLDER = Path(__file__).parent / "golden"
FILES = (FOLDER / "fa3.safetensors", FOLDER / "fa2_alibi.safetensors")
CASES = [call for file in FILES for call in recorded_calls(file)]


def test_all_cases_are_there() -> None:
    assert len(CASES) == 78


@pytest.mark.parametrize("name", ["fa3", "npu_v3"])
def test_reads_what_the_package_reads(name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    _, tensors = read_safetensors(path)
    wanted = load_file(path)
    assert tensors.keys() == wanted.keys()
    for key, t in wanted.items():
        assert tensors[key].dtype == t.dtype
        assert tensors[key].shape == t.shape
        assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (tensors[key], t)))


@pytest.mark.parametrize("call", CASES, ids=lambda call: call.name)
def test_operator_is_as_exact_as_the_recorded_kernel(call: FunctionCall) -> None:
    arguments = call.fresh()
    out, softmax_lse = call.function(**arguments)
    assert call.disagreements(out, softmax_lse, arguments) == []


@pytest.mark.parametrize("call", CASES, ids=lambda call: call.name)
def test_reference_means_what_the_recorded_kernel_did(call: FunctionCall) -> None:
    out, lse, arguments = call.exact()
    fp8 = call.arguments["q"].dtype == torch.float8_e4m3fn
    assert largest_error(call.recorded["out"], out) <= (0.15 if fp8 else 0.02)
    if call.lse_is_comparable:
        assert largest_error(call.recorded["softmax_lse"], lse) <= 0.02
    if "k_cache_after" in call.recorded:
        torch.testing.assert_close(
            arguments["k_cache"], call.recorded["k_cache_after"], rtol=0, atol=0.04
        )
        assert torch.equal(arguments["v_cache"], call.recorded["v_cache_after"])


def test_what_disagrees() -> None:
    """Every part of the results, and each cache of an append."""
    (call,) = (call for call in CASES if call.name == "append")
    right = call.fresh()
    out, softmax_lse = call.function(**right)
    nan = torch.where(out == out[0, 0, 0, 0], torch.nan, out)
    stale = call.fresh()
    for got, said in (
        ((out + 0.1, softmax_lse, right), "out errs by"),
        ((nan, softmax_lse, right), "out errs by inf"),
        ((out.double(), softmax_lse, right), "out has dtype torch.float64"),
        ((out, softmax_lse + 0.1, right), "softmax_lse errs by"),
        ((out, softmax_lse, right | {"k_cache": stale["k_cache"]}), "k_cache differs by"),
        ((out, softmax_lse, right | {"v_cache": stale["v_cache"]}), "v_cache differs by"),
    ):
        (wrong,) = call.disagreements(*got)
        assert wrong.startswith(said)
