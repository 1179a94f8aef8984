"""What autograd is promised of writes and derivatives holds on NPU as on CPU
(tests/test_autograd.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import appending, cached, ints, rand, varlen
from torch import Tensor
from torch.autograd import forward_ad

import fa3_ops

ops = torch.ops.fa3npu
HALF = torch.float16
CACHES = ("k_cache", "v_cache")
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")


def on_npu(call: dict[str, Any]) -> dict[str, Any]:
    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return (x.to(HALF) if x.is_floating_point() else x).npu()

    return {name: move(x) for name, x in call.items()}


def append() -> dict[str, Any]:
    call = appending(1)
    return {name: call[name] for name in ("k", "v", *CACHES, "cache_seqlens")}


def scatter() -> dict[str, Any]:
    call = append() | {"slot_mapping": ints(3, 9)}
    del call["cache_seqlens"]
    return call | {name: call[name][:, 0] for name in ("k", "v")}


def with_out(call: dict[str, Any], *shape: int) -> dict[str, Any]:
    return call | {"out": torch.zeros(shape)}


WRITES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "kvcache_append_": (ops.kvcache_append_, append, CACHES),
    "kvcache_scatter_": (ops.kvcache_scatter_, scatter, CACHES),
    "scatter function": (fa3_ops.kvcache_scatter_, scatter, CACHES),
    "composite": (ops.flash_attn_with_kvcache, partial(appending, 1), CACHES),
    "flash_attn_kvcache.out": (
        ops.flash_attn_kvcache.out,
        lambda: with_out(cached(1), 2, 1, 4, 16),
        ("out",),
    ),
    "flash_attn_varlen_func.out": (
        ops.flash_attn_varlen_func.out,
        lambda: with_out(varlen(), 7, 4, 16),
        ("out",),
    ),
    "function": (fa3_ops.flash_attn_with_kvcache, partial(appending, 1), CACHES),
    "function, out": (
        fa3_ops.flash_attn_with_kvcache,
        lambda: with_out(appending(1), 2, 1, 4, 16),
        (*CACHES, "out"),
    ),
}
every_write = pytest.mark.parametrize(
    ("write", "inputs", "written"), WRITES.values(), ids=WRITES.keys()
)
modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def maybe_compiled(f: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f


@every_write
@modes
def test_versions_rise(write: Any, inputs: Any, written: Any, compiled: bool) -> None:
    call = on_npu(inputs())
    before = {name: x._version for name, x in call.items() if isinstance(x, Tensor)}
    maybe_compiled(lambda: write(**call), compiled)()
    for name, version in before.items():
        assert (call[name]._version > version) == (name in written), name


@every_write
@modes
def test_a_backward_that_needs_what_was_overwritten_is_refused(
    write: Any, inputs: Any, written: Any, compiled: bool
) -> None:
    for name in written:
        call = on_npu(inputs())
        weight = torch.ones_like(call[name], requires_grad=True)
        total = (call[name][:] * weight).sum()
        with torch.no_grad():
            maybe_compiled(lambda call=call: write(**call), compiled)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@every_write
def test_what_pytorch_protects_is_refused(write: Any, inputs: Any, written: Any) -> None:
    for name in written:
        call = on_npu(inputs())
        before = call[name].cpu()
        with torch.inference_mode():
            inference = call[name].clone()
        with pytest.raises(RuntimeError, match="inference"):
            write(**call | {name: inference})
        with pytest.raises((RuntimeError, ValueError), match="grad"):
            write(**call | {name: call[name].requires_grad_()})
        assert torch.equal(call[name].detach().cpu(), before)
        assert torch.equal(inference.cpu(), before)


def test_forward_mode_is_refused() -> None:
    call = on_npu(appending(1))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call["k"], call["k"])
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            fa3_ops.flash_attn_with_kvcache(**call | {"k": dual})
    q, k, v = (x.npu() for x in rand(3, 1, 5, 2, 16, dtype=HALF))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: fa3_ops.flash_attn_func(q, k, v), (q,), (q,))


def test_per_sample_gradients() -> None:
    qkv = rand(3, 4, 1, 5, 2, 16, dtype=HALF)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa3_ops.flash_attn_func(q, k, v, causal=True).float().square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))
    for got, want in zip(gradients(*qkv.npu()), gradients(*qkv), strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=2e-2, rtol=2e-2)


def test_an_append_from_the_cache_itself() -> None:
    """The cache shifted by one: what is read is what was there before the write."""
    call = cached(1)
    for place, cache in (("npu", on_npu(call)), ("cpu", call)):
        k_cache, v_cache = cache["k_cache"], cache["v_cache"]
        before = k_cache.clone()
        at = torch.tensor([1, 2], dtype=torch.int32, device=place)
        ops.kvcache_append_(k_cache[:, :4], v_cache[:, :4], k_cache, v_cache, at)
        assert torch.equal(k_cache[0, 1:5], before[0, :4])
        assert torch.equal(k_cache[1, 2:6], before[1, :4])


def test_elements_that_share_a_place_are_refused() -> None:
    call = on_npu(append())
    call["k_cache"] = call["k_cache"][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="k_cache must have a place for every element"):
        ops.kvcache_append_(**call)
    call = on_npu(with_out(cached(1), 2, 1, 4, 16))
    call["out"] = call["out"][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="out must have a place for every element"):
        fa3_ops.flash_attn_with_kvcache(**call)
