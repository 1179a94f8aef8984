"""Calls like earlier ones on a GPU: they start the kernels that were compiled for those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import moved as on_gpu
from decode_calls import Call, changed, decode, kinds, misaligned
from launches import launches
from torch import Tensor

import fa3_ops
from fa3_ops.backends import repeated
from fa3_ops.ops import composite

ops = torch.ops.fa3npu


def public(**call: Any) -> Any:
    return fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True)


def results(call: Call, function: Any = public) -> list[Tensor]:
    """With the caches that it leaves."""
    call = dict(call)
    for name in ("k_cache", "v_cache"):  # in memory that begins where theirs does
        x = call[name]
        whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
        call[name] = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    out, softmax_lse = function(**call)
    return [out, softmax_lse, call["k_cache"], call["v_cache"]]


def first(call: Call) -> list[Tensor]:
    """The results of a call that is like no earlier one."""
    repeated.forget()
    return results(call, composite.flash_attn_with_kvcache)


def check_after(kept: Call, call: Call) -> None:
    want = first(call)
    results(kept)
    for function in (public, ops.flash_attn_with_kvcache, public):
        assert all(map(torch.equal, results(call, function), want)), list(call)


@torch.no_grad()
def test_repeated_calls_have_the_results_of_first_ones() -> None:
    torch.manual_seed(0)
    for call in map(on_gpu, kinds()):
        check_after(call, changed(call))


@torch.no_grad()
@pytest.mark.parametrize(("new", "rotary"), [(0, False), (1, False), (1, True)])
def test_tensors_may_begin_anywhere(new: int, rotary: bool) -> None:
    torch.manual_seed(0)
    call = on_gpu(decode(new, rotary))
    for other in map(on_gpu, misaligned(call)):
        check_after(call, other)
        check_after(other, call)


@torch.no_grad()
def test_recorded_in_a_graph() -> None:
    call, graph = on_gpu(decode(1, rotary=True)), torch.cuda.CUDAGraph()
    public(**call)
    with torch.cuda.graph(graph):
        got = public(**call)
    for x in call.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, got, results(call)))


@torch.no_grad()
def test_in_inference_mode() -> None:
    call = on_gpu(decode(1))
    want = results(call)
    with torch.inference_mode():
        got = results(call)
    assert all(map(torch.equal, got, want))


@torch.no_grad()
def test_another_backend_may_be_asked_for() -> None:
    call = on_gpu(decode())
    public(**call)
    with launches("cuda") as launched, fa3_ops.use_backend("torch"):
        public(**call)
    assert launched == ["torch"]
    public(**call)
    with fa3_ops.use_backend("torch"):
        torch.testing.assert_close(public(**call), public(**call), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_current() -> None:
    call = decode(1, rotary=True)
    want = results(on_gpu(call))
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        got = results(on_gpu(call, device))
        assert all(x.device == torch.device(device) for x in got)
        assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True))
    assert torch.cuda.current_device() == 0


@torch.no_grad()
def test_errors_stay(recwarn: Any) -> None:
    call = on_gpu(decode(1))
    public(**call)
    with pytest.raises(ValueError, match="cache_seqlens must be on the device of q"):
        public(**call | {"cache_seqlens": call["cache_seqlens"].cpu()})
    with pytest.raises(
        ValueError, match="k_cache is written and must not be a lazily negated view"
    ):
        public(**call | {"k_cache": torch._neg_view(call["k_cache"])})
    q = torch._neg_view(call["q"])
    for _ in range(3):
        assert torch.equal(public(**call | {"q": q})[0], public(**call | {"q": -call["q"]})[0])
