"""The choice of Triton on NPU. No kernel runs here: tests/triton_ascend compiles them, and without
CANN and a device nobody can launch them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

import fa3_ops
from fa3_ops.backends.npu import triton_ascend
from fa3_ops.backends.triton import device

HALF = torch.float16


def call(headdim: int = 64, headdim_v: int = 64) -> dict[str, Any]:
    q = torch.zeros(2, 5, 8, headdim, dtype=HALF, device="npu")
    k = torch.zeros(2, 9, 2, headdim, dtype=HALF, device="npu")
    v = torch.zeros(2, 9, 2, headdim_v, dtype=HALF, device="npu")
    return {"q": q, "k": k, "v": v, "causal": True}


def explained(**changes: Any) -> str:
    return str(fa3_ops.explain(fa3_ops.flash_attn_func, **(call() | changes)))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The distributions that there are, of those that are imported as triton."""
    there = {"triton-ascend"}
    monkeypatch.setattr(triton_ascend, "is_installed", lambda name: name in there)
    module = ModuleType("triton")
    module.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module)
    for missing in (triton_ascend.missing, device.missing):
        missing.cache_clear()
    yield there
    for missing in (triton_ascend.missing, device.missing):
        missing.cache_clear()


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestAttention:
    @pytest.mark.usefixtures("installed")
    def test_serves_what_cann_does_not(self) -> None:
        assert explained(attention_chunk=4).splitlines() == [
            "flash_attn_func: triton",
            "  compiled by Triton-Ascend, and never run on a device",
            "  not flash_attn_npu: attention_chunk",
            "  not fused_infer_attention: attention_chunk",
        ]

    @pytest.mark.usefixtures("installed")
    def test_comes_after_what_cann_has(self) -> None:
        assert explained() == "flash_attn_func: flash_attn_npu"

    @pytest.mark.usefixtures("installed")
    def test_promises_no_bits(self) -> None:
        chunked = call() | {"attention_chunk": 4}
        assert not fa3_ops.explain(fa3_ops.flash_attn_func, **chunked).bitwise

    @pytest.mark.usefixtures("installed")
    def test_leaves_to_torch_what_no_vector_core_has_room_for(self) -> None:
        text = explained(**call(64, 512), attention_chunk=4)
        assert text.startswith("flash_attn_func: torch\n")
        assert "  not triton: head dimension 512" in text

    def test_says_that_it_is_not_installed(self) -> None:
        text = explained(attention_chunk=4)
        assert text.startswith("flash_attn_func: torch\n")
        assert "  not triton: triton-ascend is not installed" in text

    def test_says_that_another_triton_is_in_its_place(self, installed: set[str]) -> None:
        installed.add("triton")
        text = explained(attention_chunk=4)
        assert "  not triton: triton is installed over triton-ascend" in text

    @pytest.mark.usefixtures("installed")
    def test_is_asked_for_by_name(self) -> None:
        with fa3_ops.use_backend("triton"):
            assert explained().startswith("flash_attn_func: triton\n")


@pytest.mark.usefixtures("installed")
@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestOtherOperators:
    def test_a_gradient_that_cann_has_not(self) -> None:
        q, k, v = (call()[name] for name in "qkv")
        lse = torch.zeros(2, 8, 5, device="npu")
        operator = torch.ops.fa3npu.flash_attn_func_backward
        chunked = fa3_ops.explain(operator, q, q, k, v, q, lse, attention_chunk=4)
        assert chunked.backend == "triton"
        wide = torch.zeros(2, 9, 2, 512, dtype=HALF, device="npu")
        out = torch.zeros(2, 5, 8, 512, dtype=HALF, device="npu")
        refused = fa3_ops.explain(operator, out, q, k, wide, out, lse)
        assert refused.steps[0].refusals["triton"] == ["head dimension 512"]

    def test_linear_without_ascends_package(self) -> None:
        x, weight = (torch.zeros(n, 32, dtype=HALF, device="npu") for n in (6, 7))
        assert fa3_ops.explain(torch.ops.fa3npu.linear, x, weight).backend == "triton"

    def test_a_write_of_a_cache_that_is_not_contiguous(self) -> None:
        x = torch.zeros(9, 2, 64, dtype=HALF, device="npu")
        cache = torch.zeros(4, 128, 2, 128, dtype=HALF, device="npu")[..., :64]
        slots = torch.arange(9, device="npu")
        operator = torch.ops.fa3npu.kvcache_scatter_
        assert fa3_ops.explain(operator, x, x, cache, cache.clone(), slots).backend == "triton"

    def test_what_torch_serves_without_a_fallback_is_triton_s_by_name_alone(self) -> None:
        table = torch.zeros(9, 32, dtype=HALF, device="npu")
        at = torch.zeros(2, dtype=torch.int32, device="npu")
        rotate = (torch.ops.fa3npu.apply_rotary, call()["q"], table, table, at)
        assert fa3_ops.explain(*rotate).backend == "torch"
        with fa3_ops.use_backend("triton"):
            assert fa3_ops.explain(*rotate).backend == "triton"
