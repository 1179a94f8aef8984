"""What callers of the real libraries pass, on NPU tensors, for every backend that can serve it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from npu_calls import assert_close, assert_lse, to_npu
from sample_inputs import ints, rand, rotary

import fa3_ops
from fa3_ops import reference, v4

pytestmark = [
    pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning"),
    pytest.mark.usefixtures("any_kernel"),
]
HALF = torch.float16


def half(*shape: int) -> torch.Tensor:
    return rand(*shape, dtype=HALF)


@pytest.mark.parametrize("total_k", [12, 14])
@pytest.mark.parametrize("packed_q", [True, False])
def test_packed_keys_with_lengths(packed_q: bool, total_k: int) -> None:
    call: dict[str, Any] = {"k": half(total_k, 2, 32), "v": half(total_k, 2, 32)}
    call |= {"seqused_k": ints(5, 7), "causal": True}
    if packed_q:
        call |= {"q": half(7, 4, 32), "cu_seqlens_q": ints(0, 3, 7)}
    else:
        call |= {"q": half(2, 4, 4, 32), "cu_seqlens_q": None}
    want, want_lse = reference.batched(**call)
    bounds = {"max_seqlen_q": 4, "max_seqlen_k": None}
    npu = to_npu(call)
    out, lse = fa3_ops.flash_attn_varlen_func(
        **npu, **bounds, cu_seqlens_k=None, return_softmax_lse=True
    )
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)
    assert torch.equal(out, v4.flash_attn_varlen_func(**npu)[0])
    cached = fa3_ops.flash_attn_with_kvcache(
        npu["q"],
        npu["k"],
        npu["v"],
        cache_seqlens=npu["seqused_k"],
        cu_seqlens_q=npu["cu_seqlens_q"],
        max_seqlen_q=4,
        causal=True,
    )
    assert torch.equal(out, cached)


MASKS = (
    {"window_size": (0, 0)},
    {"window_size": (1, 0)},
    {"attention_chunk": 2, "causal": True},
)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("leftpad", [False, True])
def test_only_the_last_page_is_seen(leftpad: bool, page_size: int, mask: dict[str, Any]) -> None:
    """Its keys past the sequence are NaN, so that it cannot stand for the pages before it."""
    k_cache, v_cache = half(2, 4, page_size, 2, 16)
    for cache in (k_cache, v_cache):
        cache[[0, 1]] = float("nan")
        cache[2, 2:] = cache[3, 6:] = float("nan")
    call: dict[str, Any] = {"q": half(2, 1, 4, 16), "k_cache": k_cache, "v_cache": v_cache}
    call |= {"page_table": ints(-1, -1, 2, -1, 3, -1).view(2, 3), **mask}
    call["cache_seqlens"] = ints(2 * page_size + 2, page_size + 6)
    if leftpad:
        call["cache_leftpad"] = ints(4, page_size + 2)
    out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
    want, want_lse = reference.flash_attn_with_kvcache(**call)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_pages_before_a_window_need_no_id(seqlen_q: int) -> None:
    """Whatever a kernel loads in their place, the page that -1 might be taken for holds NaN."""
    table = 1 + torch.randperm(8).int().view(2, 4)
    cache = half(9, 128, 2, 32)
    cache[0] = float("nan")
    call = {"q": half(2, seqlen_q, 4, 32), "k_cache": cache, "v_cache": cache.clone()}
    call |= {"cache_seqlens": ints(500, 400), "page_table": table}
    options = {"causal": True, "window_size": (70, 0)}
    want, want_lse = reference.flash_attn_with_kvcache(**call, **options)
    table[0, :3], table[1, :2], table[1, 4:] = -1, -1, -1
    out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), **options, return_softmax_lse=True)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)


def test_append_with_float32_tables_and_seqused_q() -> None:
    cos, sin = rotary(64, 32)
    call = {"q": half(2, 3, 4, 32), "k": half(2, 3, 2, 32), "v": half(2, 3, 2, 32)}
    call |= {"k_cache": half(2, 32, 2, 32), "v_cache": half(2, 32, 2, 32)}
    call |= {"cache_seqlens": ints(5, 20), "rotary_cos": cos, "rotary_sin": sin}
    call |= {"seqused_q": ints(3, 1)}
    npu = to_npu(call)
    out, lse = fa3_ops.flash_attn_with_kvcache(**npu, causal=True, return_softmax_lse=True)
    want, want_lse = reference.flash_attn_with_kvcache(**call, causal=True)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)
    torch.testing.assert_close(npu["k_cache"].cpu(), call["k_cache"], rtol=2e-3, atol=2e-3)


def test_none_and_minus_one() -> None:
    call = {"q": half(2, 3, 4, 32), "k": half(2, 5, 2, 32), "v": half(2, 5, 2, 32)}
    npu = to_npu(call)
    want = fa3_ops.flash_attn_func(**npu)
    nothing = {"window_size": (None, None), "attention_chunk": None, "softcap": None}
    assert torch.equal(fa3_ops.flash_attn_func(**npu, **nothing, num_splits=-1), want)
