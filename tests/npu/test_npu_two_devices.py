"""Tensors on npu:1 while npu:0 is the current device, as in a process that serves with several:
results, masks, tables and launches belong to the device of the tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from npu_calls import assert_close, assert_lse, examples_of, for_kernels, rounds_keys, to_npu
from sample_inputs import ints, rand
from strategies import dense_calls, kvcache_calls, varlen_calls
from test_npu_capture import Decoder
from test_npu_operators import DTYPES, SOME_HEADDIMS
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.testing import sample_calls

OTHER = "npu:1"
HALF = torch.float16
ops = torch.ops.fa3npu
pytestmark = [
    pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning"),
    pytest.mark.skipif(os.environ["CANNEMU_DEVICES"] == "1", reason="CANNEMU_DEVICES is 1"),
]


@pytest.fixture(autouse=True)
def the_current_device_stays() -> Iterator[None]:
    assert torch.npu.current_device() == 0
    yield
    assert torch.npu.current_device() == 0


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_every_operator(dtype: torch.dtype) -> None:
    """What it returns and what it writes, as on npu:0."""
    both = (sample_calls(device, dtype) for device in ("npu:0", OTHER))
    for calls in zip(*both, strict=True):
        seen = []
        for call in calls:
            with torch.no_grad():
                result = call.operator(*call.args, **call.kwargs)
            seen.append(tensors((result, call.args, call.kwargs)))
        for here, there in zip(*seen, strict=True):
            assert str(there.device) == OTHER
            same = dict(rtol=0.01, atol=0.01, equal_nan=True)
            torch.testing.assert_close(there.cpu().double(), here.cpu().double(), **same)


@pytest.mark.usefixtures("any_kernel")
class TestRandomCalls:
    @examples_of(4)
    @given(for_kernels(dense_calls(DTYPES, SOME_HEADDIMS)))
    def test_dense(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**to_npu(call, OTHER), return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))

    @examples_of(4)
    @given(for_kernels(varlen_calls(DTYPES, SOME_HEADDIMS)))
    def test_varlen(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        arguments = to_npu(call, OTHER) | bounds
        out, lse = fa3_ops.flash_attn_varlen_func(**arguments, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))

    @examples_of(4)
    @given(for_kernels(kvcache_calls(DTYPES, SOME_HEADDIMS)))
    def test_kvcache(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call, OTHER), return_softmax_lse=True)
        plain = {k: v for k, v in call.items() if k != "max_seqlen_q"}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))


KERNELS = ("flash_attn_npu", "fused_infer_attention", "torch")


def decode() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": rand(3, 5, 4, 128, dtype=HALF),
        "k_cache": rand(9, 128, 2, 128, dtype=HALF),
        "v_cache": rand(9, 128, 2, 128, dtype=HALF),
        "k": rand(3, 5, 2, 128, dtype=HALF),
        "v": rand(3, 5, 2, 128, dtype=HALF),
        "cache_seqlens": ints(300, 0, 77),
        "page_table": torch.randperm(9).int().view(3, 3),
        "rotary_cos": torch.rand(400, 32).to(HALF),
        "rotary_sin": torch.rand(400, 32).to(HALF),
        "causal": True,
    }


def check_decode(call: Callable[..., Any]) -> None:
    """call(device's arguments) as on CPU, caches too."""
    on_cpu = decode()
    npu = to_npu(on_cpu, OTHER)
    torch.npu.synchronize(OTHER)
    out, lse = call(**npu)
    want, want_lse = reference.flash_attn_with_kvcache(**on_cpu)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)
    assert_close(npu["k_cache"], on_cpu["k_cache"], HALF)
    assert_close(npu["v_cache"], on_cpu["v_cache"], HALF)


def attend(**arguments: Any) -> Any:
    return fa3_ops.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stream_that_is_not_the_default(kernel: str) -> None:
    def call(**arguments: Any) -> tuple[Tensor, ...]:
        stream = torch.npu.Stream(OTHER)
        with torch.npu.stream(stream), torch.npu.device(0), fa3_ops.use_backend(kernel):
            results = attend(**arguments)
            return tuple(x.cpu() for x in results)

    check_decode(call)


@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_in_turn(kernel: str) -> None:
    """What is made once, such as a mask, is made for every device."""
    with fa3_ops.use_backend(kernel):
        for device in (OTHER, "npu:0", OTHER):
            call = decode()
            out, lse = attend(**to_npu(call, device))
            want, want_lse = reference.flash_attn_with_kvcache(**call)
            assert_close(out, want, HALF)
            assert_lse(lse, want_lse, HALF)


@pytest.mark.parametrize("current", [0, 1])
def test_capture(current: int) -> None:
    """A decode step on npu:1 captured and replayed, whichever device is current."""
    graphed, eager = Decoder(OTHER), Decoder("npu:0")
    with torch.npu.device(current):
        metadata = graphed.made_metadata()
        graphed.step(metadata)
        eager.step()
        graph, stream = torch.npu.NPUGraph(), torch.npu.Stream(OTHER)
        torch.npu.synchronize(OTHER)
        with torch.npu.graph(graph, stream=stream), torch.npu.device(current):
            out, softmax_lse = graphed.step(metadata)
        for step in range(3):
            for decoder in (graphed, eager):
                torch.manual_seed(step)
                decoder.advance()
            metadata.copy_(graphed.made_metadata())
            graph.replay()
            want, want_lse = eager.step()
            assert torch.equal(out.cpu(), want.cpu())
            assert torch.equal(softmax_lse.cpu(), want_lse.cpu())
            assert torch.equal(graphed.k_cache.cpu(), eager.k_cache.cpu())
