"""fa3_ops.v2: FlashAttention-2's signatures and return tuples over the numbers of fa3_ops."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from expecttest import TestCase
from sample_inputs import ints, rand, rotary
from torch import Tensor

import fa3_ops
from fa3_ops import v2

# As flash_attn/flash_attn_interface.py of flash-attention has them.
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}


def arguments(function: Any) -> str:
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name: str) -> None:
    assert arguments(getattr(v2, name)) == SIGNATURES[name]


# Every option away from its default, so that an exchanged pair is seen.
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
POSITIONAL = (0.0, 0.3, True, (3, -1), 2.0, SLOPES, True, True)
KEYWORDS: dict[str, Any] = {
    "softmax_scale": 0.3,
    "causal": True,
    "window_size": (3, -1),
    "softcap": 2.0,
    "alibi_slopes": SLOPES,
}


def same(got: Any, want: tuple[Tensor, Tensor]) -> None:
    out, softmax_lse, probs = got
    assert torch.equal(out, want[0])
    assert torch.equal(softmax_lse, want[1])
    assert probs is None


class TestDense:
    def test_func(self) -> None:
        q, k, v = rand(2, 5, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 8)
        want = fa3_ops.flash_attn_func(q, k, v, return_attn_probs=True, **KEYWORDS)
        same(v2.flash_attn_func(q, k, v, *POSITIONAL), want)
        assert torch.equal(v2.flash_attn_func(q, k, v), fa3_ops.flash_attn_func(q, k, v))

    def test_packed(self) -> None:
        q, kv = rand(2, 5, 4, 16), rand(2, 9, 2, 2, 16)
        want = fa3_ops.flash_attn_func(q, *kv.unbind(2), return_attn_probs=True, **KEYWORDS)
        same(v2.flash_attn_kvpacked_func(q, kv, *POSITIONAL), want)
        qkv = rand(2, 9, 3, 4, 16)
        want = fa3_ops.flash_attn_func(*qkv.unbind(2), return_attn_probs=True, **KEYWORDS)
        same(v2.flash_attn_qkvpacked_func(qkv, *POSITIONAL), want)

    def test_gradient_reaches_the_packed_tensor(self) -> None:
        qkv = rand(2, 9, 3, 4, 16, grad=True)
        dout = rand(2, 9, 4, 16)
        parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
        (got,) = torch.autograd.grad(v2.flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
        want = torch.autograd.grad(fa3_ops.flash_attn_func(*parts, causal=True), parts, dout)
        assert torch.equal(got, torch.stack(want, 2))

    def test_softcap_below_zero_is_none(self) -> None:
        q = rand(1, 3, 2, 16)
        assert torch.equal(v2.flash_attn_func(q, q, q, softcap=-1.0), v2.flash_attn_func(q, q, q))


class TestVarlen:
    cu_q, cu_k = ints(0, 5, 5, 11), ints(0, 8, 12, 17)

    def test_func(self) -> None:
        q, k, v = rand(11, 4, 16), rand(17, 2, 16), rand(17, 2, 8)
        lengths = (self.cu_q, self.cu_k, 6, 8)
        want = fa3_ops.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **KEYWORDS)
        same(v2.flash_attn_varlen_func(q, k, v, *lengths, *POSITIONAL), want)
        kv = torch.stack((k, rand(17, 2, 16)), 1)
        want = fa3_ops.flash_attn_varlen_func(
            q, *kv.unbind(1), *lengths, return_attn_probs=True, **KEYWORDS
        )
        same(v2.flash_attn_varlen_kvpacked_func(q, kv, *lengths, *POSITIONAL), want)

    def test_qkvpacked(self) -> None:
        qkv = rand(17, 3, 4, 16)
        want = fa3_ops.flash_attn_varlen_func(
            *qkv.unbind(1), self.cu_k, self.cu_k, 8, 8, return_attn_probs=True, **KEYWORDS
        )
        same(v2.flash_attn_varlen_qkvpacked_func(qkv, self.cu_k, 8, *POSITIONAL), want)

    def test_block_table(self) -> None:
        q, k, v = rand(11, 4, 16), rand(17, 2, 16), rand(17, 2, 8)
        lengths = (self.cu_q, self.cu_k, 6, 8)
        table = ints(3, 7, 1, 0, 9, 2).view(3, 2)  # pages of 4
        k_pages, v_pages = rand(10, 4, 2, 16), rand(10, 4, 2, 8)
        for b in range(3):
            for i, row in enumerate(range(int(self.cu_k[b]), int(self.cu_k[b + 1]))):
                page = int(table[b, i // 4])
                k_pages[page, i % 4], v_pages[page, i % 4] = k[row], v[row]
        want = v2.flash_attn_varlen_func(q, k, v, *lengths, *POSITIONAL)
        got = v2.flash_attn_varlen_func(q, k_pages, v_pages, *lengths, *POSITIONAL, table)
        same(got, want[:2])


def test_with_kvcache() -> None:
    cos, sin = rotary(20, 8)
    q, new = rand(2, 3, 4, 16), (rand(2, 3, 2, 16), rand(2, 3, 2, 8))
    caches = rand(3, 20, 2, 16), rand(3, 20, 2, 8)
    ours, theirs = ([x.clone() for x in caches] for _ in range(2))
    seqlens, batch_idx, leftpad = ints(4, 9), ints(2, 0), ints(1, 3)
    want = fa3_ops.flash_attn_with_kvcache(
        q,
        *ours,
        *new,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=seqlens,
        cache_batch_idx=batch_idx,
        cache_leftpad=leftpad,
        softmax_scale=0.3,
        causal=True,
        window_size=(5, -1),
        softcap=2.0,
        rotary_interleaved=False,
        alibi_slopes=SLOPES,
        return_softmax_lse=True,
    )
    rest = (0.3, True, (5, -1), 2.0, False, SLOPES, 3, True)
    got = v2.flash_attn_with_kvcache(
        q, *theirs, *new, cos, sin, seqlens, batch_idx, leftpad, None, *rest
    )
    assert all(map(torch.equal, (*got, *theirs), (*want, *ours)))
    assert not torch.equal(theirs[0], caches[0])


def test_with_kvcache_pages() -> None:
    q, pages, table = rand(2, 1, 4, 16), rand(6, 4, 2, 16), ints(3, 1, 0, 5).view(2, 2)
    got = v2.flash_attn_with_kvcache(q, pages, pages, cache_seqlens=6, block_table=table)
    dense = pages[table.long()].flatten(1, 2)[:, :6]
    assert torch.equal(got, fa3_ops.flash_attn_func(q, dense, dense))


class TestRefusals(TestCase):
    def message(self, function: Any, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(ValueError, match="must") as caught:
            function(*args, **kwargs)
        return str(caught.value)

    def test_dropout(self) -> None:
        q, packed, cu = rand(1, 3, 2, 16), rand(3, 2, 16), ints(0, 3)
        calls = {
            v2.flash_attn_func: (q, q, q),
            v2.flash_attn_qkvpacked_func: (rand(1, 3, 3, 2, 16),),
            v2.flash_attn_kvpacked_func: (q, rand(1, 3, 2, 2, 16)),
            v2.flash_attn_varlen_func: (packed, packed, packed, cu, cu, 3, 3),
            v2.flash_attn_varlen_qkvpacked_func: (rand(3, 3, 2, 16), cu, 3),
            v2.flash_attn_varlen_kvpacked_func: (packed, rand(3, 2, 2, 16), cu, cu, 3, 3),
        }
        assert len(calls) == len(SIGNATURES) - 1  # all but flash_attn_with_kvcache
        messages = {self.message(function, *args, 0.1) for function, args in calls.items()}
        self.assertExpectedInline(
            "\n".join(messages), """dropout_p must be 0 (fa3_ops has no dropout), got 0.1"""
        )

    def test_shapes(self) -> None:
        q, cu = rand(3, 2, 16), ints(0, 3)
        pages, table = rand(4, 2, 2, 16), ints(0, 1).view(1, 2)
        messages = [
            self.message(v2.flash_attn_qkvpacked_func, rand(1, 5, 2, 2, 16)),
            self.message(v2.flash_attn_kvpacked_func, rand(1, 5, 2, 16), rand(1, 5, 3, 2, 16)),
            self.message(v2.flash_attn_varlen_qkvpacked_func, rand(5, 4, 2, 16), ints(0, 5), 5),
            self.message(v2.flash_attn_varlen_kvpacked_func, q, rand(5, 2, 16), cu, cu, 3, 3),
            self.message(
                v2.flash_attn_varlen_func, q, pages, pages, cu, ints(0), 3, 4, block_table=table
            ),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
qkv must have shape (batch_size, seqlen, 3, nheads, headdim), got (1, 5, 2, 2, 16)
kv must have shape (batch_size, seqlen_k, 2, nheads_k, headdim), got (1, 5, 3, 2, 16)
qkv must have shape (total, 3, nheads, headdim), got (5, 4, 2, 16)
kv must have shape (total_k, 2, nheads_k, headdim), got (5, 2, 16)
cu_seqlens_k must have shape (2,), got (1,)""",
        )
