"""Calls made on the CPU, moved to the NPU as they are."""

from __future__ import annotations

from typing import Any

import strategies
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from fa3_ops.testing.samples import moved


def examples_of(count: int) -> settings:
    return settings(
        strategies.examples(count),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,  # any_kernel is the same for all examples
            HealthCheck.differing_executors,
        ],
    )


examples = examples_of(100)

# Absolute error of a kernel that rounds probabilities and results to its dtype, for values of
# about 1: a few units in the last place.
TOLERANCE = {
    torch.float32: 2e-4,
    torch.float16: 6e-3,
    torch.bfloat16: 4e-2,
    torch.float8_e4m3fn: 4e-2,
}


def on_npu(t: Tensor, device: str = "npu") -> Tensor:
    return moved(t, device, t.dtype)


def to_npu(call: dict[str, Any], device: str = "npu") -> dict[str, Any]:
    return {name: on_npu(x, device) if isinstance(x, Tensor) else x for name, x in call.items()}


ONLY_TORCH = ("qv", "alibi_slopes", "attention_chunk")
ONLY_SOME = (*ONLY_TORCH, "softcap", "window_size")


def for_kernels(calls: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Three of four without what few kernels have: of all calls they would see one in a hundred."""

    def without(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
        return calls.map(lambda call: {name: x for name, x in call.items() if name not in names})

    return st.sampled_from([ONLY_SOME, ONLY_SOME, ONLY_TORCH, ()]).flatmap(without)


def to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().cpu() for t in tensors)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    got = got.detach().cpu().double()
    assert not got.isnan().any()
    torch.testing.assert_close(got, want.double(), rtol=2.0**-7, atol=TOLERANCE[dtype])


def rounds_keys(call: dict[str, Any]) -> bool:
    """Whether narrow keys times their descales are rounded to q's dtype of 16 bits."""
    keys = call["k_cache"] if "k_cache" in call else call["k"]
    return call["q"].dtype.itemsize == 2 and keys.dtype in strategies.NARROW_DTYPES


def assert_lse(got: Tensor, want: Tensor, dtype: torch.dtype, rounded_keys: bool = False) -> None:
    """With rounded keys, a quarter of eps in every product of a score, of which the largest scale
    makes some five times a unit: four standard deviations are 12 of them."""
    assert got.dtype == torch.float32
    slack = 5e-3 if dtype == torch.float8_e4m3fn else 1e-3
    if rounded_keys:
        slack = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.detach().cpu().double(), want.double(), rtol=1e-3, atol=slack)


def assert_same_tokens(got: Tensor, want: Tensor, chances: Tensor, tie: float) -> None:
    """Equal, but that from a tie of two chances on a text may go either way. Tokens are
    (batch_size, length), the chances that want was chosen by (batch_size, length, vocabulary)."""
    assert got.shape == want.shape
    for row, wanted, chance in zip(got, want, chances, strict=True):
        differ = (row != wanted).nonzero()
        if len(differ):
            best, second = chance[int(differ[0])].topk(2).values
            assert best - second < tie
    assert (got == want).float().mean() > 0.5
