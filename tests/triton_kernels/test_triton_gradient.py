"""The gradient by Triton against autograd through the reference, and its bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import (
    UNSEEN,
    Problem,
    assert_same_in_a_batch,
    assert_same_when_packed,
    assert_unseen_is_not_read,
    dense,
    solve,
    varlen,
)
from hypothesis import given
from sample_inputs import ints, rand
from strategies import dense_calls, examples, varlen_calls
from test_operators import check_gradients

from fa3_ops.backends.triton import gradient
from fa3_ops.backends.triton.attention import described

ops = torch.ops.fa3npu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
of_all = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def few_heads(call: dict[str, Any]) -> bool:
    """The interpreter takes its time."""
    return bool(call["q"].shape[-2] <= 3)


class TestNumbers:
    @examples(6)
    @given(dense_calls(DTYPES, narrow=False).filter(few_heads))
    def test_dense_calls(self, call: dict[str, Any]) -> None:
        call.pop("qv", None)
        check_gradients(dense, call)

    @examples(6)
    @given(varlen_calls(DTYPES, narrow=False).filter(few_heads))
    def test_packed_calls(self, call: dict[str, Any]) -> None:
        call.pop("qv", None)
        check_gradients(varlen, call)

    @of_all
    @pytest.mark.parametrize(("d", "dv"), [(1, 512), (512, 16), (192, 128), (72, 80)])
    def test_head_dims(self, d: int, dv: int, dtype: torch.dtype) -> None:
        q, k, v = rand(1, 20, 2, d), rand(1, 40, 1, d), rand(1, 40, 1, dv)
        call = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "causal": True}
        check_gradients(dense, call)

    @pytest.mark.parametrize(
        ("dtype", "masks"),
        [
            (torch.float16, {"causal": True}),
            (torch.float32, {"window_size": (20, 3)}),
            (torch.float16, {"window_size": (-1, 9), "softcap": 2.0}),
            (torch.float16, {"attention_chunk": 50, "alibi_slopes": torch.tensor([0.1, 0.2])}),
        ],
        ids=str,
    )
    def test_several_blocks(self, masks: dict[str, Any], dtype: torch.dtype) -> None:
        q, k, v = rand(1, 150, 2, 16), rand(1, 170, 1, 16), rand(1, 170, 1, 16)
        check_gradients(dense, {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)} | masks)


class TestBits:
    """A sequence has the same gradients alone, in a batch and packed."""

    @pytest.mark.parametrize(
        ("dtype", "masks"),
        [
            (torch.float32, {"causal": True}),
            (torch.float16, {"causal": True}),
            (torch.float16, {"window_size": (30, 11), "softcap": 3.0}),
        ],
        ids=str,
    )
    def test_packed(self, masks: dict[str, Any], dtype: torch.dtype) -> None:
        lengths = (33, 70), (70, 75), (5, 140)
        assert_same_when_packed([Problem.random(pair, dtype) for pair in lengths], **masks)

    @of_all
    def test_in_a_batch(self, dtype: torch.dtype) -> None:
        assert_same_in_a_batch(Problem.random((70, 75), dtype), causal=True)

    @of_all
    def test_one_key_has_no_gradient_through_the_softmax(self, dtype: torch.dtype) -> None:
        q, k, v = (rand(2, n, 3, 72, dtype=dtype, grad=True) for n in (5, 1, 1))
        out, _ = ops.flash_attn_func(q, k, v)
        dq, dk, _ = torch.autograd.grad(out, (q, k, v), rand(2, 5, 3, 72, dtype=dtype))
        assert not dq.any()
        assert not dk.any()

    @pytest.mark.parametrize(("d", "dv"), [(64, 64), (72, 16), (192, 128)])
    def test_descriptors_change_nothing(
        self, d: int, dv: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks that a device copies by descriptors are those that it reads by pointers."""
        problem = Problem.random((70, 70), torch.float16, headdims=(d, dv))
        want = problem.gradients(causal=True)
        used = []
        monkeypatch.setattr(gradient, "has_descriptors", lambda device: True)
        monkeypatch.setattr(gradient, "described", lambda *x: used.append(x) or described(*x))
        got = problem.gradients(causal=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert used


class TestUnseen:
    @pytest.mark.parametrize(("seqlen_q", "seqlen_k", "masks"), UNSEEN)
    def test_is_not_read(self, seqlen_q: int, seqlen_k: int, masks: dict[str, Any]) -> None:
        problem = Problem.random((seqlen_q, seqlen_k), torch.float16)
        assert_unseen_is_not_read(problem, **masks)

    @of_all
    def test_a_sink_of_infinity_leaves_no_weights(self, dtype: torch.dtype) -> None:
        problem = Problem.random((9, 9), dtype)
        dq, dk, _ = problem.gradients(sinks=torch.tensor([math.inf, 0.5]))
        assert not dq[:, 0].any()
        assert dq[:, 1].all()
        assert dk.isfinite().all()

    def test_a_sequence_without_keys_and_one_without_rows(self) -> None:
        bounds = {"cu_seqlens_q": ints(0, 3, 7, 7), "cu_seqlens_k": ints(0, 4, 4, 9)}
        dout, dlse = rand(7, 2, 16), torch.zeros(7, 2, 1)
        dq, dk, dv = solve((rand(7, 2, 16), rand(9, 2, 16), rand(9, 2, 16), dout, dlse), **bounds)
        assert dq[:3].all()
        assert not dq[3:].any()
        for x in (dk, dv):
            assert x[:4].any(-1).all()
            assert not x[4:].any()


def test_float64_is_refused_by_name() -> None:
    q, k, v = (rand(1, 3, 2, 8, dtype=torch.float64) for _ in range(3))
    with pytest.raises(NotImplementedError, match=r"triton cannot serve .*: dtype torch\.float64"):
        ops.flash_attn_func_backward(q, q, k, v, q, torch.zeros(1, 2, 3))
