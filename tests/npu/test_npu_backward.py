"""Gradients on NPU tensors against float64 autograd through the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_calls import examples, for_kernels, on_npu
from sample_inputs import ints, rand
from strategies import SIZES, cumulative, dense_calls, heads, masks, tensor, varlen_calls
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends.npu import device

FALLBACK = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")


def dense(d: int, d_v: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, 9, 4, d), (2, 17, 2, d), (2, 17, 2, d_v))
    return [rand(*shape, dtype=dtype) for shape in shapes]


def gradients(
    function: Any, inputs: list[Tensor], call: dict[str, Any], to: Any, with_lse: bool = False
) -> list[Tensor]:
    leaves = [to(x).requires_grad_() for x in inputs]
    call = {name: to(x) if isinstance(x, Tensor) else x for name, x in call.items()}
    out, softmax_lse = function(*leaves, **call)
    generator = torch.Generator().manual_seed(0)
    loss = (out * to(torch.randn(out.shape, generator=generator).to(inputs[0].dtype))).sum()
    if with_lse:
        loss = loss + (softmax_lse * to(torch.randn(softmax_lse.shape, generator=generator))).sum()
    loss = loss + sum(0 * x.sum() for x in leaves)  # an empty batch uses none of them
    return [x.cpu() for x in torch.autograd.grad(loss, leaves)]


def check(
    name: str, inputs: list[Tensor], with_lse: bool = False, slack: float = 0.02, **call: Any
) -> None:
    function = getattr(fa3_ops, name)
    flags = {"return_attn_probs": True}
    plain = {
        k: v for k, v in call.items() if k not in ("deterministic", "max_seqlen_q", "max_seqlen_k")
    }
    got = gradients(function, inputs, call | flags, on_npu, with_lse)
    want = gradients(
        reference.batched,
        inputs,
        plain,
        lambda x: x.double() if x.is_floating_point() else x,
        with_lse,
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "d_v"), [(64, 64), (80, 80), (128, 128), (96, 64), (33, 7), (192, 128)]
)
def test_head_dims_are_padded(dtype: torch.dtype, d: int, d_v: int) -> None:
    slack = 0.02 if dtype == torch.float16 else 0.15
    check("flash_attn_func", dense(d, d_v, dtype), causal=True, slack=slack)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"causal": True},
        {"window_size": (5, 2)},
        {"window_size": (3, -1)},
        {"softcap": 2.0, "causal": True},
        {"softmax_scale": 0.3},
        {"deterministic": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::fa3_ops.FallbackWarning")
def test_flash_attn_npu_serves(call: dict[str, Any]) -> None:
    check("flash_attn_func", dense(64, 64, torch.float16), **call)
    packed = [rand(11, 4, 64, dtype=torch.float16)] + [
        rand(23, 2, 64, dtype=torch.float16) for _ in range(2)
    ]
    lengths = {"cu_seqlens_q": ints(0, 5, 11), "cu_seqlens_k": ints(0, 11, 23)}
    check("flash_attn_varlen_func", packed, **lengths, max_seqlen_q=6, max_seqlen_k=12, **call)


def test_slices_of_one_projection() -> None:
    """The kernel drops storage offsets and takes every stride for dense."""
    qkv = rand(2, 9, 3, 4, 64, dtype=torch.float16)
    check("flash_attn_func", list(qkv.unbind(2)), causal=True)


def test_a_storage_offset() -> None:
    base = rand(3, 9, 4, 64, dtype=torch.float16)
    check("flash_attn_func", [base[1:], base[:2].clone(), base[1:].clone()], causal=True)


@FALLBACK
@pytest.mark.parametrize(
    "call",
    [
        {"alibi_slopes": torch.rand(4)},
        {"attention_chunk": 4},
        {"causal": True, "sinks": rand(4)},
        {"causal": True, "window_size": (4, -1), "softcap": 3.0},
    ],
    ids=lambda call: " ".join(call),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_torch_serves_the_rest(call: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slack = 1e-3 if dtype == torch.float32 else 0.02
    check("flash_attn_func", dense(24, 16, dtype), with_lse=True, slack=slack, **call)


@st.composite
def served_calls(draw: Any, packed: bool) -> dict[str, Any]:
    """Every row of q is one of a sequence and sees a key: flash_attn_npu has a backward of most."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    (nheads, nheads_k), d, dv = heads(draw), draw(SIZES), draw(SIZES)
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(1, 40), min_size=batch, max_size=batch)
    seqlens_q = torch.tensor(draw(lengths))
    seqlens_k = seqlens_q + torch.tensor(draw(lengths)) - 1
    call = masks(draw)
    del call["attention_chunk"]
    q_rows, k_rows = [batch, int(seqlens_q[0])], [batch, int(seqlens_k[0])]
    if packed:
        q_rows, k_rows = [int(seqlens_q.sum())], [int(seqlens_k.sum())]
        call |= {"cu_seqlens_q": cumulative(seqlens_q), "cu_seqlens_k": cumulative(seqlens_k)}
        used = draw(st.sampled_from([{}, {}, {}, {"seqused_q": 1}, {"seqused_k": 1}]))
        call |= {name: (seqlens_q - n).int() for name, n in used.items()}
    rows = {"q": (q_rows, nheads, d), "k": (k_rows, nheads_k, d), "v": (k_rows, nheads_k, dv)}
    return call | {
        name: tensor(draw, (*n, *width), torch.float16) for name, (n, *width) in rows.items()
    }


def check_random(name: str, call: dict[str, Any], **bounds: int) -> None:
    for unused in ("qv", "q_descale", "k_descale", "v_descale"):
        call.pop(unused, None)
    inputs = [call.pop(x) for x in "qkv"]
    check(name, inputs, slack=0.03, **call, **bounds)


@FALLBACK
@pytest.mark.usefixtures("any_kernel")
@examples
@given(served_calls(packed=False) | for_kernels(dense_calls((torch.float16,), narrow=False)))
def test_random_dense_calls(call: dict[str, Any]) -> None:
    check_random("flash_attn_func", call)


@FALLBACK
@pytest.mark.usefixtures("any_kernel")
@examples
@given(served_calls(packed=True) | for_kernels(varlen_calls((torch.float16,), narrow=False)))
def test_random_packed_calls(call: dict[str, Any]) -> None:
    check_random("flash_attn_varlen_func", call, max_seqlen_q=40, max_seqlen_k=80)


@FALLBACK
def test_rows_without_keys_and_unused_rows() -> None:
    q, k, v = (rand(n, h, 32, dtype=torch.float16) for n, h in ((14, 4), (20, 2), (20, 2)))
    lengths = {"cu_seqlens_q": ints(1, 7, 7, 12), "cu_seqlens_k": ints(0, 3, 9, 18)}
    used = {"seqused_q": ints(4, 0, 5), "seqused_k": ints(3, 2, 0)}
    bounds = {"max_seqlen_q": 6, "max_seqlen_k": 9}
    for extra in ({}, used):
        check("flash_attn_varlen_func", [q, k, v], **lengths, **extra, **bounds, causal=True)


@FALLBACK
def test_gradient_of_sinks() -> None:
    q, k, v = (x.requires_grad_() for x in dense(32, 32, torch.float32))
    sinks = rand(4, grad=True)
    out, _ = reference.batched(q, k, v, sinks=sinks, causal=True)
    (want,) = torch.autograd.grad(out.sum(), sinks)
    device_sinks = sinks.detach().npu().requires_grad_()
    inputs = (x.detach().npu().requires_grad_() for x in (q, k, v))
    out = fa3_ops.flash_attn_func(*inputs, sinks=device_sinks, causal=True)
    (got,) = torch.autograd.grad(out.sum(), device_sinks)
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=1e-3, atol=1e-3)


@FALLBACK
@pytest.mark.parametrize("backend", ["flash_attn_npu", "torch"])
def test_gradients_beside_sinks_without_end(backend: str) -> None:
    """-inf is no sink, +inf takes all weight: in the reference a number far from the scores."""
    tensors = [*dense(64, 64, torch.float16), torch.tensor([-1e4, 0.5, 1e4, 0.0])]
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out, _ = reference.batched(*leaves[:3], sinks=leaves[3], causal=True)
    want = torch.autograd.grad(out.square().sum(), leaves)
    tensors[3] = torch.tensor([-torch.inf, 0.5, torch.inf, 0.0])
    leaves = [x.detach().npu().requires_grad_() for x in tensors]
    with fa3_ops.use_backend(backend):
        out = fa3_ops.flash_attn_func(*leaves[:3], sinks=leaves[3], causal=True)
        got = torch.autograd.grad(out.float().square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=0.02, atol=0.02)


def test_the_deterministic_flag_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = device.kernel()
    assert not isinstance(found, str)
    seen = []
    bwd = found.module.bwd

    def spy(*arguments: Any) -> Any:
        seen.append(arguments[20])
        return bwd(*arguments)

    monkeypatch.setattr(found.module, "bwd", spy)
    for flag in (False, True):
        leaves = [on_npu(x).requires_grad_() for x in dense(64, 64, torch.float16)]
        fa3_ops.flash_attn_func(*leaves, deterministic=flag).sum().backward()
    assert seen == [False, True]


def test_deterministic_gradients_repeat() -> None:
    def once() -> list[Tensor]:
        torch.manual_seed(1)
        call = {"deterministic": True, "causal": True, "return_attn_probs": True}
        return gradients(fa3_ops.flash_attn_func, dense(64, 64, torch.float16), call, on_npu)

    for x, y in zip(once(), once(), strict=True):
        assert torch.equal(x, y)


def test_explain_names_the_backend() -> None:
    q, k, v = (x.npu() for x in dense(64, 64, torch.float16))
    out, softmax_lse = fa3_ops.flash_attn_func(q, k, v, return_attn_probs=True)
    operator = torch.ops.fa3npu.flash_attn_func_backward
    arguments = (torch.ones_like(out), q, k, v, out, softmax_lse)
    assert fa3_ops.explain(operator, *arguments).backend == "flash_attn_npu"
    refused = fa3_ops.explain(operator, *arguments, attention_chunk=4)
    assert refused.backend == "torch"
    assert refused.steps[0].refusals == {
        "flash_attn_npu": ["attention_chunk"],
        "triton": ["triton-ascend is not installed"],
    }
