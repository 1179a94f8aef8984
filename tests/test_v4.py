"""fa3_ops.v4: FlashAttention-4's signatures and return tuples over the numbers of fa3_ops."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from expecttest import TestCase
from sample_inputs import ints, rand
from torch import Tensor

import fa3_ops
from fa3_ops import v4

# As flash_attn/cute/interface.py of flash-attention has them.
SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, "
        "gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, "
        "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False"
    ),
    "flash_attn_combine": (
        "out_partial, lse_partial, out=None, out_dtype=None, cu_seqlens=None, seqused=None, "
        "virtual_batch_idx=None, return_lse=True"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name: str) -> None:
    got = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(getattr(v4, name)).parameters.values()
    )
    assert got == SIGNATURES[name]


def same(got: tuple[Tensor, Tensor | None], want: Any) -> None:
    assert len(got) == 2
    assert all(map(torch.equal, got, want))


def dense() -> tuple[Tensor, Tensor, Tensor]:
    return rand(2, 5, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 8)


class TestDense:
    def test_every_option(self) -> None:
        q, k, v = dense()
        qv, sink = rand(2, 5, 4, 8), rand(4)
        got = v4.flash_attn_func(
            q, k, v, qv, None, 0.3, True, (3, None), sink, 2.0, 3, True, True, return_lse=True
        )
        out, lse = fa3_ops.flash_attn_func(
            q,
            k,
            v,
            softmax_scale=0.3,
            causal=True,
            qv=qv,
            window_size=(3, 0),
            softcap=2.0,
            sinks=sink,
            return_attn_probs=True,
        )
        same(got, (out, lse.transpose(1, 2)))  # heads last, where there is a qv

    def test_lse(self) -> None:
        q, k, v = dense()
        out, lse = fa3_ops.flash_attn_func(q, k, v, return_attn_probs=True)
        same(v4.flash_attn_func(q, k, v, return_lse=True), (out, lse))
        got = v4.flash_attn_func(q, k, v)
        assert torch.equal(got[0], out)
        assert got[1] is None

    def test_gradients(self) -> None:
        inputs = [x.requires_grad_() for x in (*dense(), rand(4))]
        q, k, v, sink = inputs
        ours = v4.flash_attn_func(q, k, v, learnable_sink=sink, return_lse=True)
        theirs = fa3_ops.flash_attn_func(q, k, v, sinks=sink, return_attn_probs=True)
        grads = [torch.randn_like(x) for x in theirs]
        got, want = (torch.autograd.grad(x, inputs, grads) for x in (ours, theirs))
        assert all(map(torch.equal, got, want))

    @pytest.mark.parametrize(
        ("window_size", "causal"),
        [
            ((None, None), False),
            ((None, None), True),
            ((2, None), False),
            ((None, 2), False),
            ((None, 2), True),
            ((3, 1), False),
            ((3, 1), True),
            ((0, 0), False),
            ((-1, -1), False),
            ((-1, 0), False),  # a negative sum is no limit at all
            ((-1, 4), True),  # causal makes the right side 0 first
            ((-1, -1), True),
        ],
    )
    def test_window(self, window_size: tuple[int | None, int | None], causal: bool) -> None:
        q, k, v = (x.double() for x in dense())
        left, right = window_size
        if causal:
            right = 0
        if left is not None and right is not None and left + right < 0:
            left, right = None, 0 if causal else None
        distance = torch.arange(9) - (torch.arange(5)[:, None] + 9 - 5)
        seen = torch.ones(5, 9, dtype=torch.bool)
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
        )
        out, _ = v4.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
        torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-12, atol=1e-12)

    def test_one_tensor_512_wide_as_k_and_v_is_latent(self) -> None:
        q, qv, kv = rand(1, 2, 4, 512), rand(1, 2, 4, 512), rand(1, 7, 1, 512)
        out, lse = fa3_ops.flash_attn_func(qv, kv, kv, return_attn_probs=True)
        want = (out, lse.transpose(1, 2))
        same(v4.flash_attn_func(qv, kv, kv, return_lse=True), want)
        same(v4.flash_attn_func(q, kv, kv, qv, return_lse=True), want)  # q takes no part
        assert not torch.equal(v4.flash_attn_func(q, kv, kv.clone(), qv)[0], out)


class TestVarlen:
    cu_q, cu_k = ints(0, 5, 5, 11), ints(0, 8, 12, 17)

    def test_packed(self) -> None:
        q, k, v = rand(11, 4, 16), rand(17, 2, 16), rand(17, 2, 8)
        qv, sink, used_q, used_k = rand(11, 4, 8), rand(4), ints(4, 0, 6), ints(8, 2, 3)
        got = v4.flash_attn_varlen_func(
            *(q, k, v, qv, self.cu_q, self.cu_k, 6, 8, 2, used_q, used_k, None, None),
            *(0.3, True, (3, None), sink, 2.0, 3, True, True),
            return_lse=True,
        )
        out, lse = fa3_ops.flash_attn_varlen_func(
            q,
            k,
            v,
            self.cu_q,
            self.cu_k,
            6,
            8,
            used_q,
            used_k,
            softmax_scale=0.3,
            causal=True,
            qv=qv,
            window_size=(3, -1),
            softcap=2.0,
            sinks=sink,
            return_attn_probs=True,
        )
        same(got, (out, lse.transpose(0, 1)))

    def test_lengths_may_be_left_out(self) -> None:
        q, k = rand(11, 4, 16), rand(17, 2, 16)
        want = fa3_ops.flash_attn_varlen_func(q, k, k, self.cu_q, self.cu_k, 6, 8)
        out, lse = v4.flash_attn_varlen_func(q, k, k, None, self.cu_q, self.cu_k)
        assert torch.equal(out, want)
        assert lse is None

    @pytest.mark.parametrize("packed", [False, True])
    def test_pages(self, packed: bool) -> None:
        pages, table, used = rand(6, 4, 2, 16), ints(3, 1, 0, 5).view(2, 2), ints(6, 3)
        q = rand(5, 4, 16) if packed else rand(2, 3, 4, 16)
        lengths = {"cu_seqlens_q": ints(0, 3, 5)} if packed else {"seqused_q": ints(3, 2)}
        got = v4.flash_attn_varlen_func(
            q,
            pages,
            pages,
            page_table=table,
            seqused_k=used,
            causal=True,
            return_lse=True,
            **lengths,
        )
        kv = pages[table.long()].flatten(1, 2)
        rows = q.split([3, 2]) if packed else (q[0], q[1, :2])
        for b, (n, row) in enumerate(zip(used.tolist(), rows, strict=True)):
            out, lse = fa3_ops.flash_attn_func(
                row[None], kv[b : b + 1, :n], kv[b : b + 1, :n], causal=True, return_attn_probs=True
            )
            at = slice(3 * b, 3 * b + len(row)) if packed else (b, slice(len(row)))
            assert torch.equal(got[0][at], out[0])
            assert torch.equal(got[1].transpose(-1, -2)[at], lse[0].transpose(0, 1))


@pytest.mark.parametrize(
    "schedule",
    [
        {"num_splits": 0},
        {"num_splits": 7},
        {"pack_gqa": True},
        {"pack_gqa": False},
        {"deterministic": True},
        {"min_seqlen_k": 3},
        {"seqlen_k_per_split": 128},
        {"scheduler_metadata": ints(1, 1)},
        {"scheduler_metadata": ints(1, 1), "disable_scheduler_metadata": True},
    ],
    ids=str,
)
def test_a_schedule_changes_no_number(schedule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, kv, used = rand(2, 3, 4, 16), rand(2, 600, 2, 16), ints(600, 270)
    want = v4.flash_attn_varlen_func(q, kv, kv, seqused_k=used, return_lse=True)
    same(v4.flash_attn_varlen_func(q, kv, kv, seqused_k=used, return_lse=True, **schedule), want)


class TestCombine:
    def test_numbers_and_dtypes(self) -> None:
        out_partial, lse_partial = rand(3, 2, 5, 4, 16), rand(3, 2, 5, 4)
        want = fa3_ops.flash_attn_combine(out_partial, lse_partial)
        same(v4.flash_attn_combine(out_partial, lse_partial), want)
        got, lse = v4.flash_attn_combine(out_partial, lse_partial, None, torch.float16)
        assert torch.equal(got, want[0].half())
        half = out_partial.bfloat16()
        got, lse = v4.flash_attn_combine(half, lse_partial, return_lse=False)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, fa3_ops.flash_attn_combine(half.float(), lse_partial)[0].bfloat16())
        assert lse is None
        out = torch.empty(2, 5, 4, 16, dtype=torch.float16)
        got, _ = v4.flash_attn_combine(out_partial, lse_partial, out, virtual_batch_idx=ints(1, 0))
        assert got is out
        assert torch.equal(out, want[0].half())

    def test_packed(self) -> None:
        out_partial, lse_partial = rand(3, 7, 4, 16), rand(3, 7, 4)
        want = fa3_ops.flash_attn_combine(out_partial, lse_partial)
        same(v4.flash_attn_combine(out_partial, lse_partial, cu_seqlens=ints(0, 3, 7)), want)


class TestRefusals(TestCase):
    def message(self, function: Any, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(ValueError, match=r"must|not supported") as caught:
            function(*args, **kwargs)
        return str(caught.value)

    def test_what_is_not_supported(self) -> None:
        q, packed, cu = rand(1, 3, 2, 16), rand(3, 2, 16), ints(0, 3)
        refused = {
            "gather_kv_indices": ints(0),
            "score_mod": max,
            "score_mod_bwd": max,
            "mask_mod": max,
            "aux_tensors": [packed],
            "aux_scalars": (1,),
            "block_sparse_tensors": object(),
            "block_sparse_tensors_bwd": object(),
        }
        messages = [self.message(v4.flash_attn_func, q, q, q, **{n: x}) for n, x in refused.items()]
        del refused["block_sparse_tensors_bwd"]  # varlen has none
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        assert messages[:-1] == [
            self.message(v4.flash_attn_varlen_func, packed, packed, packed, **lengths, **{n: x})
            for n, x in refused.items()
        ]
        combine = v4.flash_attn_combine
        messages.append(self.message(combine, rand(2, 1, 3, 2, 16), rand(2, 1, 3, 2), seqused=cu))
        self.assertExpectedInline(
            "\n".join(messages),
            """\
gather_kv_indices is not supported by fa3_ops.v4, got Tensor
score_mod is not supported by fa3_ops.v4, got builtin_function_or_method
score_mod_bwd is not supported by fa3_ops.v4, got builtin_function_or_method
mask_mod is not supported by fa3_ops.v4, got builtin_function_or_method
aux_tensors is not supported by fa3_ops.v4, got list
aux_scalars is not supported by fa3_ops.v4, got tuple
block_sparse_tensors is not supported by fa3_ops.v4, got object
block_sparse_tensors_bwd is not supported by fa3_ops.v4, got object
seqused is not supported by fa3_ops.v4, got Tensor""",
        )

    def test_values(self) -> None:
        q = rand(1, 3, 2, 16)
        messages = [
            self.message(v4.flash_attn_func, q, q, q, window_size=(5, -1)),
            self.message(v4.flash_attn_func, q, q, q, window_size=(None, -1)),
            self.message(v4.flash_attn_func, q, q, q, window_size=(-1, None)),
            self.message(
                v4.flash_attn_combine, rand(2, 1, 3, 2, 16), rand(2, 1, 3, 2), cu_seqlens=ints(0, 3)
            ),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
window_size must hold None or numbers from 0 on, because a window that does not touch the diagonal is not served, got (5, -1)
window_size must hold None or numbers from 0 on, because a window that does not touch the diagonal is not served, got (None, -1)
window_size must hold None or numbers from 0 on, because a window that does not touch the diagonal is not served, got (-1, None)
out_partial must have shape (num_splits, total_q, nheads, headdim), got (2, 1, 3, 2, 16) with cu_seqlens""",
        )
