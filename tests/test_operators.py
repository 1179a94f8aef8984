"""Each operator against the float64 reference, one class an operator."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import ints, rand, rotary
from strategies import (
    FORWARD_DTYPES,
    NARROW_DTYPES,
    assert_exact,
    assert_lse,
    assert_neighbours,
    dense_calls,
    examples,
    hide_pages,
    kvcache_calls,
    narrow_append_calls,
    scatter_calls,
    tensor,
    threads,
    varlen_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference

ops = torch.ops.fa3npu


# float32 arithmetic, and products of bfloat16 where there are such instructions
of_both_kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def bfloat16_call(kind: str, seqlen_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose scores are of a kind."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        10 * torch.rand(1, n, 1, 128, generator=generator) - 5 for n in (256, seqlen_k, seqlen_k)
    )
    slope = torch.arange(seqlen_k)[None, :, None, None] / seqlen_k
    if kind == "peaked":
        q = 3 * q
    if kind in ("rising", "falling"):
        q, k = q.abs(), k.abs() * (slope if kind == "rising" else 1 - slope)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=0, equal_nan=True)


class TestFlashAttnFunc:
    @examples(100)
    @given(dense_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**call, return_attn_probs=True)
        want_out, want_lse = reference.batched(**call)
        assert_exact(out, want_out, call["q"].dtype)
        assert_lse(lse, want_lse)

    @pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
    @pytest.mark.parametrize(("d", "dv"), [(1, 512), (512, 1), (192, 128), (512, 512), (33, 257)])
    def test_head_dims(self, dtype: torch.dtype, d: int, dv: int) -> None:
        q, k, v = rand(1, 9, 4, d), rand(1, 70, 2, d), rand(1, 70, 2, dv)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out, lse = ops.flash_attn_func(q, k, v, causal=True)
        want_out, want_lse = reference.batched(q, k, v, causal=True)
        assert_exact(out, want_out, dtype)
        assert_lse(lse, want_lse)

    @pytest.mark.parametrize("seqlen_k", [63, 64, 65, 1023, 1024, 1025, 2500])
    def test_lengths_around_blocks_and_chunks(self, seqlen_k: int) -> None:
        q, k, v = rand(1, 130, 3, 40), rand(1, seqlen_k, 1, 40), rand(1, seqlen_k, 1, 40)
        for masks in ({}, {"causal": True}, {"window_size": (1100, 3)}, {"attention_chunk": 1000}):
            out, lse = ops.flash_attn_func(q, k, v, **masks)
            want_out, want_lse = reference.batched(q, k, v, **masks)
            assert_exact(out, want_out, q.dtype)
            assert_lse(lse, want_lse)

    @pytest.mark.parametrize("far", [2**31, 2**63 - 1])
    def test_a_limit_beyond_every_length_is_no_limit(self, far: int) -> None:
        q, k, v = rand(1, 9, 2, 16), rand(1, 70, 2, 16), rand(1, 70, 2, 16)
        want = ops.flash_attn_func(q, k, v)
        for masks in ({"window_size": (far, far)}, {"attention_chunk": far}):
            got = ops.flash_attn_func(q, k, v, **masks)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])

    def test_large_scores_do_not_overflow(self) -> None:
        torch.manual_seed(0)  # two that are nearly the largest would differ by float32's rounding
        q, k, v = 300 * rand(1, 5, 2, 64), 300 * rand(1, 200, 2, 64), rand(1, 200, 2, 64)
        out, lse = ops.flash_attn_func(q, k, v)
        want_out, want_lse = reference.batched(q, k, v)
        torch.testing.assert_close(out.double(), want_out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)

    @of_both_kinds
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("where", ["k", "v"])
    @pytest.mark.parametrize("rows", [90, 79])  # not all blocks of rows end where steps of keys do
    def test_unseen_nan_reaches_no_row(
        self, bad: float, where: str, rows: int, dtype: torch.dtype
    ) -> None:
        q, k, v = (rand(1, seqlen, 2, 16, dtype=dtype) for seqlen in (rows, 90, 90))
        clean, lse = ops.flash_attn_func(q, k, v, causal=True)
        (k if where == "k" else v)[:, 50:] = bad
        out, dirty_lse = ops.flash_attn_func(q, k, v, causal=True)
        blind = rows - 40
        assert torch.equal(out[:, :blind], clean[:, :blind])
        assert torch.equal(dirty_lse[:, :, :blind], lse[:, :, :blind])
        if math.isnan(bad):
            assert out[:, blind:].isnan().all()  # the rows that do see it say so

    @of_both_kinds
    def test_nan_in_q_stays_in_its_row(self, dtype: torch.dtype) -> None:
        q, k, v = (rand(1, 70, 2, 16, dtype=dtype) for _ in range(3))
        clean, _ = ops.flash_attn_func(q, k, v)
        q[:, 3, 1] = math.nan
        out, lse = ops.flash_attn_func(q, k, v)
        assert out[:, 3, 1].isnan().all()
        assert lse[:, 1, 3].isnan().all()
        out[:, 3, 1] = clean[:, 3, 1]
        assert torch.equal(out, clean)

    @pytest.mark.parametrize("kind", ["uniform", "peaked", "rising", "falling"])
    @pytest.mark.parametrize("seqlen_k", [200, 1024, 3000])
    def test_bfloat16_loses_no_more_than_its_probabilities(self, kind: str, seqlen_k: int) -> None:
        """Where P is rounded to bfloat16, it is relative to the greatest score so far: then a row's
        greatest weight is exactly 1."""
        q, k, v = bfloat16_call(kind, seqlen_k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        sums = p.sum(-1).transpose(1, 2)[..., None]

        def out(p: Tensor) -> Tensor:
            return torch.einsum("bhqk,bkhd->bqhd", p.double(), v.double()) / sums

        def rms_error(x: Tensor) -> float:
            return float((x.bfloat16().double() - out(p)).square().mean().sqrt())

        got = fa3_ops.flash_attn_func(q, k, v)
        assert rms_error(got) <= 1.1 * rms_error(out(p.bfloat16()))

    @of_both_kinds
    @pytest.mark.parametrize("sink", [-math.inf, 1e30, math.inf])
    def test_a_sink_takes_no_weight_or_all_of_it(self, sink: float, dtype: torch.dtype) -> None:
        q, k, v = (rand(1, 9, 2, 16, dtype=dtype, grad=True) for _ in range(3))
        sinks = torch.tensor([sink, 0.5], requires_grad=True)
        call = {"causal": True, "window_size": (3, -1), "sinks": sinks}
        out, lse = ops.flash_attn_func(q, k, v, **call)
        want_out, want_lse = reference.batched(q, k, v, **call)
        assert_exact(out, want_out, dtype)
        assert_lse(lse, want_lse)
        grads = torch.autograd.grad(out[:, :, 0].float().sum(), (q, k, v, sinks))
        assert all(torch.isfinite(x).all() for x in grads)
        assert sink < 0 or not any(x.any() for x in grads)

    def test_qkvpacked(self) -> None:
        qkv = rand(2, 9, 3, 4, 16)
        want = fa3_ops.flash_attn_func(*qkv.unbind(2), causal=True)
        assert torch.equal(fa3_ops.flash_attn_qkvpacked_func(qkv, causal=True), want)
        grouped = rand(2, 9, 8, 16)
        want = fa3_ops.flash_attn_func(*grouped.split([4, 2, 2], 2))
        assert torch.equal(fa3_ops.flash_attn_qkvpacked_func(grouped, num_heads_q=4), want)

    def test_schedules_never_change_a_number(self) -> None:
        q, k, v = rand(1, 3, 4, 32), rand(1, 3000, 2, 32), rand(1, 3000, 2, 32)
        want = ops.flash_attn_func(q, k, v)
        for schedule in (
            {"num_splits": 0},
            {"num_splits": 7},
            {"pack_gqa": True},
            {"sm_margin": 3},
        ):
            got = ops.flash_attn_func(q, k, v, **schedule)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def gradients(function: Any, inputs: list[Tensor], call: dict[str, Any], double: bool) -> Any:
    """Gradients of a random projection of out and softmax_lse."""
    leaves = [x.detach().double() if double else x.detach() for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    call = call | dict(zip(("q", "k", "v", "sinks"), leaves, strict=False))
    out, lse = function(**call)
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(out.shape, generator=generator).to(inputs[0].dtype)
    dlse = torch.randn(lse.shape, generator=generator)
    finite = lse.isfinite()
    loss = (out * dout.to(out)).sum() + (lse[finite] * dlse.to(lse)[finite]).sum()
    loss = loss + sum(0 * x.sum() for x in leaves)  # an empty batch uses none of them
    return torch.autograd.grad(loss, leaves)


def check_gradients(function: Any, call: dict[str, Any]) -> None:
    for name in ("q_descale", "k_descale", "v_descale"):
        call.pop(name, None)
    inputs = [call[name] for name in ("q", "k", "v", "sinks") if name in call]
    got = gradients(function, inputs, call, double=False)
    want = gradients(reference.batched, inputs, call, double=True)
    assert_gradients(got, want, inputs)


def assert_gradients(got: Any, want: Any, inputs: list[Tensor]) -> None:
    """Those of q, k, v and perhaps sinks, against float64 ones."""
    dtype = inputs[0].dtype
    # out is saved rounded and dP comes from it, so the error is of the size of the gradient.
    relative = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 4e-3}.get(dtype, 3e-2)
    for name, g, w in zip(("dq", "dk", "dv", "dsinks"), got, want, strict=False):
        assert g.dtype == inputs[("dq", "dk", "dv", "dsinks").index(name)].dtype
        if w.numel():
            assert (g.double() - w).abs().max() <= relative * (1 + w.abs().max()), name


GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TestFlashAttnFuncBackward:
    @examples(100)
    @given(dense_calls(GRADIENT_DTYPES, narrow=False))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        call.pop("qv", None)
        check_gradients(lambda **c: fa3_ops.flash_attn_func(**c, return_attn_probs=True), call)

    @pytest.mark.parametrize(("d", "dv"), [(1, 512), (512, 1), (192, 128), (256, 256)])
    def test_head_dims(self, d: int, dv: int) -> None:
        call = {"q": rand(1, 70, 4, d), "k": rand(1, 130, 2, d), "v": rand(1, 130, 2, dv)}
        check_gradients(lambda **c: ops.flash_attn_func(**c), call | {"causal": True})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_one_key_has_no_gradient_through_the_softmax(self, dtype: torch.dtype) -> None:
        q, k, v = (rand(2, n, 3, 72, dtype=dtype, grad=True) for n in (5, 1, 1))
        out, _ = ops.flash_attn_func(q, k, v)
        dq, dk, _ = torch.autograd.grad(out, (q, k, v), rand(2, 5, 3, 72, dtype=dtype))
        assert torch.equal(dq, torch.zeros_like(dq))
        assert torch.equal(dk, torch.zeros_like(dk))

    def test_gradcheck(self) -> None:
        qkv = [
            rand(1, n, h, 5, dtype=torch.float64, grad=True) for n, h in ((4, 2), (6, 1), (6, 1))
        ]
        for masks in ({"causal": True}, {"window_size": (2, 1), "softcap": 2.0}):

            def out(q: Tensor, k: Tensor, v: Tensor, masks: Any = masks) -> Tensor:
                result: Tensor = ops.flash_attn_func(q, k, v, **masks)[0]
                return result

            assert torch.autograd.gradcheck(out, qkv)

    @of_both_kinds
    def test_unseen_nan_reaches_no_gradient(self, dtype: torch.dtype) -> None:
        q, k, v = (rand(1, 90, 2, 16, dtype=dtype, grad=True) for _ in range(3))
        dout = rand(1, 50, 2, 16, dtype=dtype)
        out, _ = ops.flash_attn_func(q, k, v, causal=True)
        clean = torch.autograd.grad(out[:, :50], (q, k, v), dout)
        with torch.no_grad():
            k[:, 50:] = math.nan
            v[:, 50:] = math.nan
        out, _ = ops.flash_attn_func(q, k, v, causal=True)
        dirty = torch.autograd.grad(out[:, :50], (q, k, v), dout)
        assert torch.equal(dirty[0][:, :50], clean[0][:, :50])

    @of_both_kinds
    def test_nan_in_a_row_reaches_only_the_keys_it_sees(self, dtype: torch.dtype) -> None:
        q, k, v = (rand(1, 90, 2, 16, dtype=dtype, grad=True) for _ in range(3))
        dout = rand(1, 90, 2, 16, dtype=dtype)
        clean = torch.autograd.grad(ops.flash_attn_func(q, k, v, causal=True)[0], (q, k, v), dout)
        with torch.no_grad():
            q[:, :5] = math.nan
        dirty = torch.autograd.grad(ops.flash_attn_func(q, k, v, causal=True)[0], (q, k, v), dout)
        for name, d, c in zip(("dq", "dk", "dv"), dirty, clean, strict=True):
            assert torch.equal(d[:, 5:], c[:, 5:]), name
            assert d[:, :5].isnan().all(), name

    @of_both_kinds
    def test_deterministic_and_independent_of_threads_and_neighbours(
        self, dtype: torch.dtype
    ) -> None:
        qkv = [rand(3, 700, h, 64, dtype=dtype) for h in (4, 2, 2)]
        dout = rand(3, 700, 4, 64, dtype=dtype)

        def grads(batch: slice) -> tuple[Tensor, ...]:
            part = [x[batch].detach().requires_grad_() for x in qkv]
            out, _ = ops.flash_attn_func(*part, window_size=(600, 3))
            return torch.autograd.grad(out, part, dout[batch])

        want = grads(slice(0, 3))
        for n in (1, 2, 5, 16):
            with threads(n):
                assert all(torch.equal(g, w) for g, w in zip(grads(slice(0, 3)), want, strict=True))
        alone = grads(slice(1, 2))
        assert all(torch.equal(g, w[1:2]) for g, w in zip(alone, want, strict=True))

    @of_both_kinds
    @pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1])
    def test_a_nan_of_any_bits_is_seen(self, bits: int, dtype: torch.dtype) -> None:
        q, k, v = (rand(1, 40, 2, 16, dtype=dtype, grad=True) for _ in range(3))
        nan = ints(bits).view(torch.float32)
        out, _ = ops.flash_attn_func(q, k, v, alibi_slopes=torch.cat([nan, nan]))
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(x.isnan().all() for x in (out, *gradients))
        out, lse = ops.flash_attn_func(q, k, v)
        dlse = nan.expand(lse.shape)
        dq, dk = torch.autograd.grad((out, lse), (q, k), (torch.ones_like(out), dlse))
        assert dq.isnan().all()
        assert dk.isnan().all()

    def test_qv_is_refused_by_name(self) -> None:
        q, k, v, qv = (rand(1, 3, 2, 8, grad=True) for _ in range(4))
        out, _ = ops.flash_attn_func(q, k, v, qv=qv)
        with pytest.raises(NotImplementedError, match="qv of flash_attn_func has no backward"):
            out.sum().backward()
        out, _ = ops.flash_attn_func(q, k, v, qv=qv.detach())
        with pytest.raises(NotImplementedError, match="flash_attn_func with qv has no backward"):
            out.sum().backward()

    def test_what_has_no_gradient_is_refused_by_name(self) -> None:
        q, k, v = (rand(1, 3, 2, 8, grad=True) for _ in range(3))
        out, _ = ops.flash_attn_func(q, k, v, alibi_slopes=torch.rand(2, requires_grad=True))
        with pytest.raises(NotImplementedError, match="alibi_slopes of flash_attn_func has no"):
            out.sum().backward()
        out, _ = ops.flash_attn_func(q, k, v)
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="flash_attn_func_backward has no backward"):
            dq.sum().backward()


class TestFlashAttnVarlenFunc:
    @examples(100)
    @given(varlen_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        out, lse = fa3_ops.flash_attn_varlen_func(**call, **bounds, return_attn_probs=True)
        want_out, want_lse = reference.batched(**call)
        assert_exact(out, want_out, call["q"].dtype)
        assert_lse(lse, want_lse)

    def test_out_is_written(self) -> None:
        q, k, v, cu = rand(7, 4, 16), rand(7, 2, 16), rand(7, 2, 16), ints(0, 3, 7)
        want = fa3_ops.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4)
        buffer = torch.full((7, 4, 40), math.nan)
        out = buffer[..., 3:19]
        got = fa3_ops.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, out=out)
        assert got is out
        assert torch.equal(out, want)
        assert buffer[..., :3].isnan().all()
        assert buffer[..., 19:].isnan().all()


class TestFlashAttnVarlenFuncBackward:
    @examples(100)
    @given(varlen_calls(GRADIENT_DTYPES, narrow=False))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        call.pop("qv", None)
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        check_gradients(
            lambda **c: fa3_ops.flash_attn_varlen_func(**c, **bounds, return_attn_probs=True), call
        )


class TestFlashAttnWithKvcache:
    @examples(200)
    @given(kvcache_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        hide_pages(call)
        ours = call | {"k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
        call.pop("max_seqlen_q", None)
        want_out, want_lse = reference.flash_attn_with_kvcache(**call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**ours, return_softmax_lse=True)
        # A rotated vector may round the other way: one ulp of it moves a score.
        half = call["q"].dtype.itemsize <= 2 and "rotary_cos" in call
        coarse = {2: 0.05, 1: 0.5}[call["q"].dtype.itemsize] if half else None
        assert_exact(out, want_out, call["q"].dtype, coarse)
        assert_lse(lse, want_lse, coarse)
        ulp = torch.finfo(call["q"].dtype).eps if "rotary_cos" in call else 0.0
        for name in ("k_cache", "v_cache"):
            torch.testing.assert_close(
                ours[name].double(), call[name].double(), rtol=ulp, atol=4 * ulp, equal_nan=True
            )

    @examples(60)
    @given(kvcache_calls())
    def test_strided_caches_are_written_in_place(self, call: dict[str, Any]) -> None:
        contiguous = call | {
            name: call[name].contiguous().clone() for name in ("k_cache", "v_cache")
        }
        want = fa3_ops.flash_attn_with_kvcache(**contiguous)
        assert torch.equal(fa3_ops.flash_attn_with_kvcache(**call), want)
        for name in ("k_cache", "v_cache"):
            assert_same_bits(call[name], contiguous[name])

    @pytest.mark.parametrize("page_size", [1, 3, 16, 100])
    def test_paged_equals_dense(self, page_size: int) -> None:
        k_cache, v_cache = rand(2, 300, 2, 24), rand(2, 300, 2, 24)
        q, cache_seqlens = rand(2, 3, 6, 24), ints(300, 170)
        want = fa3_ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=True
        )
        pages = -(-300 // page_size)
        padding = (0, 0, 0, 0, 0, pages * page_size - 300)
        table = torch.randperm(2 * pages).int().view(2, pages)
        paged = []
        for cache in (k_cache, v_cache):
            rows = torch.nn.functional.pad(cache, padding).view(2 * pages, page_size, 2, 24)
            paged.append(torch.empty_like(rows))
            paged[-1][table.flatten().long()] = rows
        got = fa3_ops.flash_attn_with_kvcache(
            q, *paged, cache_seqlens=cache_seqlens, page_table=table, causal=True
        )
        assert torch.equal(got, want)

    def test_int_cache_seqlens_and_aliases(self) -> None:
        k_cache, v_cache, q = rand(4, 8, 2, 16), rand(4, 8, 2, 16), rand(2, 1, 4, 16)
        table, sinks = ints(1, 0, 3, 2).view(2, 2), rand(4)
        want = fa3_ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=ints(9, 9), page_table=table, sinks=sinks
        )
        out = torch.empty_like(want)
        got = fa3_ops.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=9,
            block_table=table,
            s_aux=sinks,
            out=out,
            window_size=torch.tensor([-1, -1]),
        )
        assert got is out
        assert torch.equal(out, want)

    def test_has_no_backward_and_says_so(self) -> None:
        q, cache = rand(1, 1, 2, 8, grad=True), rand(1, 4, 2, 8)
        out = fa3_ops.flash_attn_with_kvcache(q, cache, cache)
        with pytest.raises(NotImplementedError, match="flash_attn_kvcache has no backward"):
            out.sum().backward()


class TestFlashAttnKvcache:
    def test_seqused_q(self) -> None:
        q, k_cache, v_cache = rand(2, 5, 4, 16), rand(2, 20, 2, 16), rand(2, 20, 2, 16)
        call = {"seqused_q": ints(3, 0), "causal": True}
        out, lse = ops.flash_attn_kvcache(q, k_cache, v_cache, cache_seqlens=ints(9, 20), **call)
        want_out, want_lse = reference.batched(q, k_cache, v_cache, seqused_k=ints(9, 20), **call)
        assert_exact(out, want_out, q.dtype)
        assert_lse(lse, want_lse)

    def test_paged_through_flash_attn_varlen_func(self) -> None:
        q, pages_k, pages_v = rand(5, 4, 16), rand(8, 4, 2, 16), rand(8, 4, 2, 16)
        cu, used, table = ints(0, 2, 5), ints(6, 9), torch.randperm(8).int()[:6].view(2, 3)
        out, lse = fa3_ops.flash_attn_varlen_func(
            *(q, pages_k, pages_v, cu, None, 3, 12),
            seqused_k=used,
            block_table=table,
            causal=True,
            return_attn_probs=True,
        )
        want_out, want_lse = reference.batched(
            *(q, pages_k, pages_v),
            cu_seqlens_q=cu,
            seqused_k=used,
            page_table=table,
            causal=True,
        )
        assert_exact(out, want_out, q.dtype)
        assert_lse(lse, want_lse)

    def test_scheduler_metadata_never_changes_a_number(self) -> None:
        q, cache, seqlens = rand(2, 1, 4, 16), rand(2, 3000, 2, 16), ints(3000, 5)
        metadata = fa3_ops.get_scheduler_metadata(2, 1, 3000, 4, 2, 16, seqlens)
        want = ops.flash_attn_kvcache(q, cache, cache, cache_seqlens=seqlens)
        for schedule in (metadata, torch.zeros(99, dtype=torch.int32)):
            got = ops.flash_attn_kvcache(
                q, cache, cache, cache_seqlens=seqlens, scheduler_metadata=schedule
            )
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


class TestThreads:
    """Results do not change with torch.set_num_threads, split or not."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_same_bits(self, dtype: torch.dtype) -> None:
        calls = (
            (rand(1, 1, 4, 32), rand(1, 5000, 1, 32), rand(1, 5000, 1, 32)),
            (rand(2, 150, 6, 32), rand(2, 1500, 2, 32), rand(2, 1500, 2, 32)),
        )
        calls = tuple(tuple(x.to(dtype) for x in call) for call in calls)
        with threads(1):
            want = [ops.flash_attn_func(*call, causal=True, softcap=9.0) for call in calls]
        for n in (2, 3, 8):
            with threads(n):
                for call, (out, lse) in zip(calls, want, strict=True):
                    got_out, got_lse = ops.flash_attn_func(*call, causal=True, softcap=9.0)
                    assert torch.equal(got_out, out)
                    assert torch.equal(got_lse, lse)


class TestKvcacheAppend:
    def test_nothing_else_is_written(self) -> None:
        k_cache, v_cache = rand(4, 10, 2, 16), rand(4, 10, 2, 8)
        before_k, before_v = k_cache.clone(), v_cache.clone()
        k, v = rand(2, 3, 2, 16), rand(2, 3, 2, 8)
        ops.kvcache_append_(k, v, k_cache, v_cache, ints(7, 0), cache_batch_idx=ints(3, 1))
        before_k[3, 7:10], before_k[1, :3] = k[0], k[1]
        before_v[3, 7:10], before_v[1, :3] = v[0], v[1]
        assert torch.equal(k_cache, before_k)
        assert torch.equal(v_cache, before_v)

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @examples(100)
    @given(call=narrow_append_calls())
    def test_random_calls_of_narrow_caches(self, backend: str, call: dict[str, Any]) -> None:
        want = call | {name: call[name].clone() for name in ("k_cache", "v_cache")}
        with fa3_ops.use_backend(backend):
            ops.kvcache_append_(**call)
        reference.append(**want)
        for name in ("k_cache", "v_cache"):
            if "rotary_cos" in call and name == "k_cache":
                assert_neighbours(call[name], want[name])
            else:
                assert_same_bits(call[name], want[name])


class TestKvcacheScatter:
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @examples(200)
    @given(call=scatter_calls())
    def test_random_calls(self, backend: str, call: dict[str, Any]) -> None:
        want = call | {name: call[name].clone() for name in ("k_cache", "v_cache")}
        with fa3_ops.use_backend(backend):
            fa3_ops.kvcache_scatter_(**call)
        reference.scatter(**want)
        assert_same_bits(call["k_cache"], want["k_cache"])
        assert_same_bits(call["v_cache"], want["v_cache"])

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("cache_dtype", NARROW_DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_every_number(self, dtype: torch.dtype, cache_dtype: torch.dtype, backend: str) -> None:
        """All 65536 of a dtype, two descales."""
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 2, 16)
        cache = torch.zeros(len(x), 1, 2, 16, dtype=torch.int8).view(cache_dtype)
        descale = torch.tensor([1.0, 0.37])
        with fa3_ops.use_backend(backend):
            fa3_ops.kvcache_scatter_(x, x, cache, cache.clone(), torch.arange(len(x)), descale)
        assert_same_bits(cache[:, 0], reference.narrowed(x, cache_dtype, descale))

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_of_equal_slots_one_is_written(self, backend: str) -> None:
        k, v, caches = rand(3, 2, 16), rand(3, 2, 16), rand(2, 2, 4, 2, 16)
        with fa3_ops.use_backend(backend):
            fa3_ops.kvcache_scatter_(k, v, *caches, torch.tensor([5, 5, 5]))
        assert any(torch.equal(caches[0, 1, 1], row) for row in k)
        assert any(torch.equal(caches[1, 1, 1], row) for row in v)

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_a_slot_behind_the_end_is_refused_before_the_first_write(self, backend: str) -> None:
        caches = rand(2, 2, 4, 2, 16)
        before = caches.clone()
        with (
            fa3_ops.use_backend(backend),
            pytest.raises(ValueError, match=r"^slot_mapping\[1\] must be less than the 8 slots"),
        ):
            fa3_ops.kvcache_scatter_(rand(2, 2, 16), rand(2, 2, 16), *caches, torch.tensor([0, 8]))
        assert torch.equal(caches, before)

    @pytest.mark.parametrize(
        ("error", "message", "changes"),
        [
            (ValueError, r"k must have shape \(num_tokens, 2, 16\), got", {"k": rand(2, 3, 16)}),
            (ValueError, r"v must have shape \(2, 2, 16\), got", {"v": rand(1, 2, 16)}),
            (ValueError, r"v_cache must have shape \(2, 4, 2,", {"v_cache": rand(2, 3, 2, 16)}),
            (
                TypeError,
                "k must have dtype torch.float32 like k_cache, got",
                {"k": rand(2, 2, 16).half()},
            ),
            (
                TypeError,
                "slot_mapping must have dtype torch.int32 or torch.int64",
                {"slot_mapping": rand(2)},
            ),
            (
                ValueError,
                "slot_mapping must have at most the 2 rows of k, got 3",
                {"slot_mapping": ints(1, 2, 3)},
            ),
            (TypeError, "slot_mapping must be a tensor, got None", {"slot_mapping": None}),
            (
                ValueError,
                r"k_descale must have shape \(2,\), \(1,\) or \(\), got \(2, 2\)",
                {"k_descale": rand(2, 2)},
            ),
            (TypeError, "v_descale must have dtype torch.float32", {"v_descale": rand(2).half()}),
            (ValueError, "k_cache must have a contiguous last", {"k_cache": rand(2, 4, 16, 2).mT}),
            (
                ValueError,
                "v_cache must have a place for every",
                {"v_cache": rand(1, 4, 2, 16).expand(2, 4, 2, 16)},
            ),
        ],
        ids=str,
    )
    def test_errors(self, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
        caches = {"k_cache": rand(2, 4, 2, 16), "v_cache": rand(2, 4, 2, 16)}
        call = {"k": rand(2, 2, 16), "v": rand(2, 2, 16), **caches, "slot_mapping": ints(1, 2)}
        with pytest.raises(error, match=f"^{message}"):
            fa3_ops.kvcache_scatter_(**(call | changes))


class TestApplyRotary:
    @examples(100)
    @given(st.data())
    def test_random_calls(self, data: Any) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        d, interleaved = data.draw(st.integers(2, 40)), data.draw(st.booleans())
        cos, sin = rotary(50, 2 * data.draw(st.integers(1, d // 2)))
        x = tensor(data.draw, (2, data.draw(st.integers(0, 9)), 3, d), torch.float32)
        first, advance = ints(data.draw(st.integers(0, 40)), 0), data.draw(st.booleans())
        got = ops.apply_rotary(x, cos, sin, first, None, interleaved, advance)
        for b in range(2):
            positions = first[b] + torch.arange(x.shape[1]) * int(advance)
            want = reference.rotate(x[b], cos, sin, positions, interleaved)
            torch.testing.assert_close(got[b], want, rtol=1e-6, atol=1e-6)


class TestFlashAttnCombine:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("splits", [1, 2, 17])
    def test_parts_of_an_attention(self, dtype: torch.dtype, splits: int) -> None:
        """Attention over pieces of the keys, merged, is attention over all of them."""
        q, k, v = rand(2, 5, 4, 16), rand(2, 100, 2, 16), rand(2, 100, 2, 16)
        cuts = [round(i * 100 / splits) for i in range(splits + 1)]
        cuts[-1:] = [100, 100]  # and one empty piece
        parts = [ops.flash_attn_func(q, k[:, a:b], v[:, a:b]) for a, b in pairwise(cuts)]
        outs = torch.stack([out for out, _ in parts])
        lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
        out, lse = fa3_ops.flash_attn_combine(outs, lses, out_dtype=dtype)
        want_out, want_lse = reference.batched(q, k, v)
        assert out.dtype == dtype
        assert_exact(out, want_out, dtype)
        assert_lse(lse.transpose(1, 2), want_lse)

    def test_no_part_sees_a_key(self) -> None:
        outs = torch.full((2, 1, 3, 1, 4), math.nan)
        lses = torch.tensor([-math.inf, math.inf]).view(2, 1, 1, 1).expand(2, 1, 3, 1)
        out, lse = fa3_ops.flash_attn_combine(outs, lses)
        assert torch.equal(out, torch.zeros(1, 3, 1, 4))
        assert torch.equal(lse, torch.full((1, 3, 1), -math.inf))

    def test_packed_and_out(self) -> None:
        outs, lses = rand(3, 7, 4, 16), rand(3, 7, 4)
        out, lse = fa3_ops.flash_attn_combine(outs, lses)
        want_out, want_lse = fa3_ops.flash_attn_combine(outs[:, None], lses[:, None])
        assert torch.equal(out, want_out[0])
        assert torch.equal(lse, want_lse[0])
        buffer = torch.empty(7, 4, 16, dtype=torch.bfloat16)
        got, _ = fa3_ops.flash_attn_combine(outs, lses, out=buffer)
        assert got is buffer
        assert torch.equal(buffer, out.bfloat16())


class TestGetSchedulerMetadata:
    def test_size_depends_on_the_batch_alone(self) -> None:
        seqlens = ints(0, 1, 1024, 1025)
        got = fa3_ops.get_scheduler_metadata(4, 1, 2048, 8, 2, 64, seqlens)
        assert got.tolist() == [0, 1, 1, 2]
        longer = fa3_ops.get_scheduler_metadata(
            4, 1, 2048, 8, 2, 64, seqlens, max_seqlen_k_new=1, num_splits=3, causal=True
        )
        assert longer.tolist() == [1, 1, 2, 2]

    def test_lengths_behind_the_batch_are_padding(self) -> None:
        """Servers pass the tensors of their largest batch, of which the first sequences count."""
        for seqlens in (ints(1024, 1025, 77, -5), ints(9, 1024, 0, 1025, 0, 77, 0, -5)[1::2]):
            got = fa3_ops.get_scheduler_metadata(
                *(2, 1, 2048, 8, 2, 64, seqlens), cu_seqlens_q=ints(0, 1, 2, 9, 4), num_splits=0
            )
            assert got.tolist() == [1, 2, 0, 0]
        got = fa3_ops.get_scheduler_metadata(
            *(2, 1, 2048, 8, 2, 64, ints(1024, 1025, 77)),
            cu_seqlens_k_new=ints(0, 1, 1, 9),
            cache_leftpad=ints(0, 1, 5),
        )
        assert got.tolist() == [2, 1, 0]

    @pytest.mark.parametrize(
        ("lengths", "text"),
        [
            ({}, r"cache_seqlens must have at least 4 elements, got shape \(3,\)"),
            ({"cache_seqlens": ints(1, 2, 3, 4).view(2, 2)}, r"cache_seqlens .* shape \(2, 2\)"),
            ({"cu_seqlens_q": ints(0, 1, 2, 3)}, "cu_seqlens_q must have at least 5 elements"),
            ({"cu_seqlens_k_new": ints(0)}, "cu_seqlens_k_new must have at least 5 elements"),
            ({"cache_leftpad": ints(0, 0, 0)}, "cache_leftpad must have at least 4 elements"),
        ],
    )
    def test_too_few_lengths(self, lengths: dict[str, Tensor], text: str) -> None:
        enough = {} if not lengths else {"cache_seqlens": ints(1, 2, 3, 4)}
        call = {"cache_seqlens": ints(1, 2, 3)} | enough | lengths
        with pytest.raises(ValueError, match=text):
            fa3_ops.get_scheduler_metadata(4, 1, 2048, 8, 2, 64, **call)
        if "cu_seqlens_q" not in lengths:  # which nothing reads on CPU
            seqlens = call.pop("cache_seqlens")
            with pytest.raises(RuntimeError, match=text):
                ops.get_scheduler_metadata(4, 1, 9, 8, 2, 64, seqlens, torch.half, **call)


class TestBitwise:
    """A row has the same bits however its sequence was computed."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "options", [{}, {"window_size": (300, 0)}, {"softcap": 8.0, "sinks": True}], ids=str
    )
    def test_training_prefill_chunks_and_decode(
        self, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        torch.manual_seed(0)
        seqlen, nheads, nheads_k, d, page_size = 1200, 6, 2, 40, 24
        options = options | ({"sinks": rand(nheads)} if options.get("sinks") else {})
        q, k, v = (rand(seqlen, h, d, dtype=dtype) for h in (nheads, nheads_k, nheads_k))
        neighbour = [rand(77, h, d, dtype=dtype) for h in (nheads, nheads_k, nheads_k)]
        packed = [torch.cat([n, x]) for n, x in zip(neighbour, (q, k, v), strict=True)]
        cu = ints(0, 77, 77 + seqlen)
        want = fa3_ops.flash_attn_varlen_func(
            *(*packed, cu, cu, seqlen, seqlen), causal=True, return_attn_probs=True, **options
        )
        out, lse = want[0][77:], want[1][:, 77:]

        dense = fa3_ops.flash_attn_func(
            *(x[None] for x in (q, k, v)), causal=True, return_attn_probs=True, **options
        )
        assert torch.equal(dense[0][0], out)
        assert torch.equal(dense[1][0], lse)

        pages = seqlen // page_size
        table = torch.randperm(pages).int()[None]
        caches = [rand(pages, page_size, nheads_k, d, dtype=dtype) for _ in range(2)]
        cuts = [0, 1, 65, 400, 1023, 1025, 1190, *range(1191, seqlen + 1)]
        for first, last in pairwise(cuts):  # prefill in odd chunks, then decode token by token
            part = slice(first, last)
            got_out, got_lse = fa3_ops.flash_attn_with_kvcache(
                *(q[None, part], *caches, k[None, part], v[None, part]),
                cache_seqlens=first,
                page_table=table,
                causal=True,
                return_softmax_lse=True,
                num_splits=first % 4,
                **options,
            )
            assert torch.equal(got_out[0], out[part])
            assert torch.equal(got_lse[0], lse[:, part])
