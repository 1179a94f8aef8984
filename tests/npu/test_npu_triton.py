"""The choice of Triton on NPU. No kernel runs here: tests/triton_ascend compiles them, and without
CANN and a device nobody can launch them."""

from __future__ import annotations

from collections.abc import Iterator
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
    monkeypatch.setattr(device, "missing", lambda: [] if there else ["triton is not installed"])
    triton_ascend.missing.cache_clear()
    yield there
    triton_ascend.missing.cache_clear()


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
        assert "  not triton: headdim_v 512" in text

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
