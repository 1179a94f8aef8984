"""The gradient by Triton against autograd through the reference, and its bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from sample_inputs import ints, rand
from strategies import dense_calls, examples, varlen_calls
from test_operators import check_gradients
from torch import Tensor

import fa3_ops
from fa3_ops.backends.triton import gradient
from fa3_ops.backends.triton.attention import described

ops = torch.ops.fa3npu
DTYPES = (torch.float32, torch.float16)  # bfloat16 is wrong in Triton's interpreter
of_both = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LONG = (33, 140), (70, 75), (5, 200)  # (seqlen_q, seqlen_k): several blocks of rows, of keys


def dense(**call: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = fa3_ops.flash_attn_func(**call, return_attn_probs=True)
    return results


def varlen(**call: Any) -> tuple[Tensor, Tensor]:
    bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
    results: tuple[Tensor, Tensor] = fa3_ops.flash_attn_varlen_func(
        **bounds | call, return_attn_probs=True
    )
    return results


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

    @of_both
    @pytest.mark.parametrize(("d", "dv"), [(1, 512), (512, 16), (192, 128), (72, 80)])
    def test_head_dims(self, d: int, dv: int, dtype: torch.dtype) -> None:
        q, k, v = rand(1, 20, 2, d), rand(1, 40, 1, d), rand(1, 40, 1, dv)
        call = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "causal": True}
        check_gradients(dense, call)

    @of_both
    @pytest.mark.parametrize(
        "masks",
        [
            {"causal": True},
            {"window_size": (20, 3)},
            {"window_size": (-1, 9), "softcap": 2.0},
            {"attention_chunk": 50, "alibi_slopes": torch.tensor([0.1, 0.2])},
        ],
        ids=lambda masks: "-".join(masks),
    )
    def test_several_blocks(self, masks: dict[str, Any], dtype: torch.dtype) -> None:
        q, k, v = rand(1, 150, 2, 16), rand(1, 170, 1, 16), rand(1, 170, 1, 16)
        check_gradients(dense, {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)} | masks)


def gradients(
    inputs: tuple[Tensor, ...], doubled: tuple[Tensor, Tensor], **call: Any
) -> tuple[Tensor, ...]:
    """dq, dk, dv from dout and dsoftmax_lse."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    function = varlen if "cu_seqlens_q" in call else dense
    outputs = function(**dict(zip("qkv", leaves, strict=True)), **call)
    return torch.autograd.grad(outputs, leaves, doubled)


def sequence(m: int, n: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(q, k, v), (dout, dsoftmax_lse) without a batch dimension."""
    shapes = (m, 2, 24), (n, 1, 24), (n, 1, 16)
    inputs = tuple(torch.randn(shape).to(dtype) for shape in shapes)
    return inputs, (torch.randn(m, 2, 16).to(dtype), torch.randn(2, m))


class TestBits:
    """A sequence has the same gradients alone, in a batch and packed."""

    masks = pytest.mark.parametrize(
        "masks",
        [{"causal": True}, {"window_size": (30, 11), "softcap": 3.0}],
        ids=lambda masks: "-".join(masks),
    )

    @of_both
    @masks
    def test_packed(self, masks: dict[str, Any], dtype: torch.dtype) -> None:
        """Between NaN, and where rows are unused, behind them."""
        sequences = [sequence(m, n, dtype) for m, n in LONG]
        alone = [
            gradients(tuple(x[None] for x in inputs), (dout[None], dlse[None]), **masks)
            for inputs, (dout, dlse) in sequences
        ]
        starts = {"q": (2, 37, 120, 130), "k": (1, 145, 221, 430)}

        def packed(parts: list[Tensor], bounds: tuple[int, ...]) -> Tensor:
            x = torch.full((bounds[-1] + 3, *parts[0].shape[1:]), math.nan, dtype=parts[0].dtype)
            for start, part in zip(bounds, parts, strict=False):
                x[start : start + len(part)] = part
            return x

        inputs = tuple(
            packed([s[0][i] for s in sequences], starts["q" if i == 0 else "k"]) for i in range(3)
        )
        dout = packed([s[1][0] for s in sequences], starts["q"])
        dlse = packed([s[1][1].T[..., None] for s in sequences], starts["q"])[..., 0].T
        together = gradients(
            inputs,
            (dout, dlse),
            cu_seqlens_q=ints(*starts["q"]),
            cu_seqlens_k=ints(*starts["k"]),
            seqused_q=ints(*(m for m, _ in LONG)),
            seqused_k=ints(*(n for _, n in LONG)),
            max_seqlen_q=100,
            max_seqlen_k=300,
            **masks,
        )
        for i, (got, bounds) in enumerate(
            zip(together, (starts["q"], *[starts["k"]] * 2), strict=True)
        ):
            for start, want in zip(bounds, (grads[i][0] for grads in alone), strict=False):
                assert torch.equal(got[start : start + len(want)], want)
                got[start : start + len(want)] = 0
            assert not got.any()  # of what no sequence has

    @of_both
    def test_in_a_batch(self, dtype: torch.dtype) -> None:
        """Beside a sequence of NaN."""
        inputs, doubled = sequence(70, 75, dtype)
        alone = gradients(
            tuple(x[None] for x in inputs), tuple(x[None] for x in doubled), causal=True
        )  # type: ignore[arg-type]
        both = (
            tuple(torch.stack((torch.full_like(x, math.nan), x)) for x in xs)
            for xs in (inputs, doubled)
        )
        for got, want in zip(gradients(*both, causal=True), alone, strict=True):  # type: ignore[arg-type]
            assert torch.equal(got[1], want[0])

    @of_both
    def test_a_key_that_is_alone_has_no_gradient_through_the_softmax(
        self, dtype: torch.dtype
    ) -> None:
        q, k, v = (rand(2, n, 3, 72, dtype=dtype, grad=True) for n in (5, 1, 1))
        out, _ = ops.flash_attn_func(q, k, v)
        dq, dk, _ = torch.autograd.grad(out, (q, k, v), rand(2, 5, 3, 72, dtype=dtype))
        assert not dq.any()
        assert not dk.any()


class TestUnseen:
    @of_both
    @pytest.mark.parametrize(
        ("seqlen_q", "seqlen_k", "masks"),
        [
            (100, 30, {"causal": True}),  # the first 70 rows see nothing
            (20, 200, {"window_size": (10, 0)}),  # nobody sees the first 170 keys
            (150, 40, {"attention_chunk": 64, "window_size": (50, 20)}),
        ],
    )
    def test_nan_of_the_unseen_is_not_read(
        self, seqlen_q: int, seqlen_k: int, masks: dict[str, Any], dtype: torch.dtype
    ) -> None:
        full = {"causal": False, "window_size": (-1, -1), "attention_chunk": 0} | masks
        seen = fa3_ops.reference.mask(seqlen_q, seqlen_k, **full)
        blind, unseen = ~seen.any(1), ~seen.any(0)
        assert blind.any() or unseen.any()
        inputs, (dout, dlse) = sequence(seqlen_q, seqlen_k, dtype)
        clean = gradients(tuple(x[None] for x in inputs), (dout[None], dlse[None]), **masks)
        for x, rows in zip(
            (*inputs, dout, dlse.T), (blind, unseen, unseen, blind, blind), strict=True
        ):
            x[rows] = math.nan
        dirty = gradients(tuple(x[None] for x in inputs), (dout[None], dlse[None]), **masks)
        for got, want, rows in zip(dirty, clean, (blind, unseen, unseen), strict=True):
            assert torch.equal(got, want)
            assert not got[0, rows].any()

    @of_both
    def test_a_sink_of_infinity_leaves_no_weights(self, dtype: torch.dtype) -> None:
        inputs, doubled = sequence(9, 9, dtype)
        sinks = torch.tensor([math.inf, 0.5])
        dq, dk, _ = gradients(
            tuple(x[None] for x in inputs),
            tuple(x[None] for x in doubled),  # type: ignore[arg-type]
            sinks=sinks,
        )
        assert not dq[:, :, 0].any()
        assert dq[:, :, 1].all()
        assert dk.isfinite().all()

    def test_no_keys(self) -> None:
        """The second sequence has none, the third no rows."""
        call = {"cu_seqlens_q": ints(0, 3, 7, 7), "cu_seqlens_k": ints(0, 4, 4, 9)}
        inputs = rand(7, 2, 16), rand(9, 2, 16), rand(9, 2, 16)
        dq, dk, dv = gradients(inputs, (rand(7, 2, 16), torch.zeros(2, 7)), **call)
        assert dq[:3].all()
        assert not dq[3:].any()
        for x in (dk, dv):
            assert x[:4].any(-1).all()
            assert not x[4:].any()


def test_float64_is_refused_by_name() -> None:
    q, k, v = (rand(1, 3, 2, 8, dtype=torch.float64) for _ in range(3))
    lse = torch.zeros(1, 2, 3)
    with pytest.raises(
        NotImplementedError, match=r"triton cannot serve the call: dtype torch\.float64"
    ):
        ops.flash_attn_func_backward(q, q, k, v, q, lse)


@of_both
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (72, 16), (192, 128)])
def test_descriptors_change_no_bit(
    d: int, dv: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16-bit tensors that a device copies by descriptors are those of pointers."""
    inputs = tuple(rand(1, 70, 1, n, dtype=dtype) for n in (d, d, dv))
    doubled = rand(1, 70, 1, dv, dtype=dtype), rand(1, 1, 70)
    want = gradients(inputs, doubled, causal=True)
    used = []
    monkeypatch.setattr(gradient, "copies_blocks", lambda device: True)
    monkeypatch.setattr(gradient, "described", lambda *x: used.append(x) or described(*x))
    got = gradients(inputs, doubled, causal=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert bool(used) == (dtype == torch.float16)
