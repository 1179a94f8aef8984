"""Random calls against the float64 reference, on NPU tensors, for every backend that can serve
them. Strides, poisoned memory and odd sizes as on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from npu_calls import assert_close, assert_lse, to_npu
from strategies import dense_calls, kvcache_calls, varlen_calls

import fa3_ops
from fa3_ops import reference

examples = settings(
    max_examples=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def served(call: dict[str, Any]) -> bool:
    """float64 is refused by name: see test_npu_choice.py."""
    return call["q"].dtype != torch.float64


class TestFlashAttnFunc:
    @examples
    @given(dense_calls(DTYPES))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**to_npu(call), return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)


class TestFlashAttnVarlenFunc:
    @examples
    @given(varlen_calls(DTYPES))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        out, lse = fa3_ops.flash_attn_varlen_func(**to_npu(call), **bounds, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)


class TestFlashAttnWithKvcache:
    @examples
    @given(kvcache_calls().filter(served))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        device = to_npu(call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**device, return_softmax_lse=True)
        plain = {k: v for k, v in call.items() if k != "max_seqlen_q"}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)
        for name in ("k_cache", "v_cache"):
            torch.testing.assert_close(
                device[name].cpu().float(), call[name].float(), rtol=0.01, atol=1e-3, equal_nan=True
            )
