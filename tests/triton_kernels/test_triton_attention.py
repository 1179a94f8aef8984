"""Attention in Triton's interpreter: random calls against the reference, and bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import ints
from strategies import (
    RELATIVE,
    assert_lse,
    dense_calls,
    examples,
    hide_pages,
    kvcache_calls,
    varlen_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends.triton import attention, narrow

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADDIMS = st.tuples(st.integers(1, 24), st.integers(1, 24))
# Weights are rounded to the dtype before they meet the values.
SLACK = {torch.float32: 3e-5, torch.float16: 5 * 2.0**-12, torch.bfloat16: 5 * 2.0**-9}


def assert_close(out: Tensor, want: Tensor, dtype: torch.dtype, coarse: float = 0.0) -> None:
    assert not out.isnan().any()
    slack = max(SLACK[dtype], coarse)
    torch.testing.assert_close(out.double(), want, rtol=2 * RELATIVE[dtype], atol=slack)


def is_simulated(call: dict[str, Any]) -> bool:
    """Not bfloat16 beside 8 bits, which the interpreter does not convert to it."""
    keys = call["k_cache"] if "k_cache" in call else call["k"]
    return bool(call["q"].dtype != torch.bfloat16 or keys.dtype == torch.bfloat16)


class TestRandomCalls:
    @examples(15)
    @given(dense_calls(DTYPES, HEADDIMS).filter(is_simulated))
    def test_dense(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**call, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, 1e-4)

    @examples(15)
    @given(varlen_calls(DTYPES, HEADDIMS).filter(is_simulated))
    def test_varlen(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        out, lse = fa3_ops.flash_attn_varlen_func(**call, **bounds, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, 1e-4)

    @examples(15)
    @given(kvcache_calls(DTYPES, HEADDIMS).filter(is_simulated))
    def test_kvcache(self, call: dict[str, Any]) -> None:
        hide_pages(call)
        ours = call | {"k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
        call.pop("max_seqlen_q", None)
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**ours, return_softmax_lse=True)
        # A rotated vector may round the other way: one ulp of it moves a score.
        half = call["q"].dtype.itemsize == 2 and "rotary_cos" in call
        assert_close(out, want, call["q"].dtype, 0.05 if half else 0.0)
        assert_lse(lse, want_lse, 0.05 if half else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestBits:
    """A row alone, by the training operator, and in other company."""

    def rows(self, dtype: torch.dtype, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((5, 6), (keys, 2), (keys, 2))
        q, k, v = (torch.randn(2, n, heads, 16, generator=generator) for n, heads in sizes)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    @pytest.mark.parametrize("window_size", [(-1, -1), (700, 0)], ids=str)
    def test_chunks_as_work_items(
        self, dtype: torch.dtype, window_size: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = (x[:1, :, :1] for x in self.rows(dtype, 1100))
        options = {"causal": True, "window_size": window_size, "return_attn_probs": True}
        want = fa3_ops.flash_attn_func(q, k, v, **options)
        monkeypatch.setattr(attention, "processors", lambda device: 1000)
        got = fa3_ops.flash_attn_func(q, k, v, **options)
        assert all(map(torch.equal, got, want))

    def test_decode_of_pages_is_the_last_row(self, dtype: torch.dtype) -> None:
        q, k, v = self.rows(dtype, 96)
        want = fa3_ops.flash_attn_func(q, k, v, causal=True)
        for page_size in (32, 3):
            pages = -(-96 // page_size)
            table = torch.randperm(2 * pages).int().view(2, pages)
            caches = []
            for x in (k, v):
                padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * page_size - 96))
                cache = torch.full((2 * pages, page_size, 2, 16), float("nan"), dtype=dtype)
                cache[table.flatten().long()] = padded.view(2 * pages, page_size, 2, 16)
                caches.append(cache)
            got = fa3_ops.flash_attn_with_kvcache(
                q[:, -1:], *caches, cache_seqlens=ints(96, 96), page_table=table, causal=True
            )
            assert torch.equal(got, want[:, -1:])

    def test_packed_and_alone(self, dtype: torch.dtype) -> None:
        q, k, v = self.rows(dtype, 70)
        want = [fa3_ops.flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in (0, 1)]
        cu_q, cu_k = ints(0, 5, 10), ints(0, 70, 140)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        got = fa3_ops.flash_attn_varlen_func(*packed, cu_q, cu_k, 9, 90)
        assert torch.equal(got.view_as(q), torch.cat(want))

    def test_dropped_keys(self, dtype: torch.dtype) -> None:
        """A cache without its first keys, which a window hides."""
        q, k, v = self.rows(dtype, 600)
        options = {"causal": True, "window_size": (60, 0)}
        want = fa3_ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=600, **options)
        got = fa3_ops.flash_attn_with_kvcache(
            *(q, k[:, 501:], v[:, 501:]),
            cache_seqlens=99,
            cache_start=ints(501, 501),
            **options,
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("cache", [torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("headdims", [(16, 24), (80, 64)], ids=str)
def test_pairs_of_a_narrow_cache(
    headdims: tuple[int, int], cache: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Hopper loads them. float8_e4m3fn is converted there by what no interpreter has."""
    monkeypatch.setattr(narrow, "has_descriptors", lambda device: True)
    q, k, v = (torch.randn(2, n, h, headdims[0]) for n, h in ((3, 4), (70, 2), (70, 2)))
    k, v = ((20 * x).to(cache) for x in (k, v.repeat(1, 1, 1, 2)[..., : headdims[1]]))
    q = (q * 2.0**20).half().clamp(-1000, 1000) if cache == torch.int8 else q.bfloat16() * 2.0**20
    options = {"softmax_scale": 2.0**-26, "causal": True, "k_descale": torch.tensor([0.3])}
    out = fa3_ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(70, 50), **options)
    want, _ = reference.flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(70, 50), **options)
    assert_close(out / 20, want / 20, q.dtype)
    shifted = torch.zeros(2, 70, 2, headdims[0] + 1).to(cache)[..., 1:].copy_(k)
    alone = fa3_ops.flash_attn_with_kvcache(
        q[:, 1:2], shifted, v, cache_seqlens=ints(69, 49), **options
    )
    assert torch.equal(alone, out[:, 1:2])


def test_nan_of_a_score_reaches_out_and_softmax_lse() -> None:
    q, k, v = (torch.randn(1, n, 1, 16).half() for n in (3, 70, 70))
    q[0, 1, 0, 3] = float("nan")
    out, lse = fa3_ops.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out[0, :, 0].isnan().all(-1).tolist() == [False, True, False]
    assert lse[0, 0].isnan().tolist() == [False, True, False]
