"""Random calls against the float64 reference, on NPU tensors, for every backend that can serve
them. Strides, poisoned memory and odd sizes as on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_calls import assert_close, assert_lse, examples, for_kernels, to_npu
from sample_inputs import ints, rand
from strategies import HEADDIMS, dense_calls, kvcache_calls, varlen_calls
from torch import Tensor

import fa3_ops
from fa3_ops import reference

pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
# Some that the kernels take of a cache, which is not padded, and FIA of packed q.
SOME_HEADDIMS = st.sampled_from([(16, 16), (32, 32), (128, 128), (192, 128)]) | HEADDIMS


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnFunc:
    @examples
    @given(for_kernels(dense_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**to_npu(call), return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnVarlenFunc:
    @examples
    @given(for_kernels(varlen_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        out, lse = fa3_ops.flash_attn_varlen_func(**to_npu(call), **bounds, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnWithKvcache:
    @examples
    @given(for_kernels(kvcache_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        device = to_npu(call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**device, return_softmax_lse=True)
        plain = {k: v for k, v in call.items() if k != "max_seqlen_q"}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype)
        for name in ("k_cache", "v_cache"):
            torch.testing.assert_close(
                device[name].cpu().float(), call[name].float(), rtol=0.01, atol=1e-3, equal_nan=True
            )


class TestBitwise:
    """Where flash_attn_npu serves: lengths that its flash-decode cut would split, were it let."""

    LENGTHS = (1500, 1, 700, 1040)

    def cache(self) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        pages = {name: rand(48, 128, 1, 16, dtype=torch.float16) for name in ("k_cache", "v_cache")}
        return to_npu(pages), torch.randperm(48).int().view(4, 12).npu()

    def test_a_row_is_the_same_alone_and_in_any_batch(self) -> None:
        cache, page_table = self.cache()
        q = rand(4, 2, 16, dtype=torch.float16).npu()
        options = {"max_seqlen_q": 1, "causal": True, "return_softmax_lse": True}
        seqlens = ints(*self.LENGTHS).npu()
        cu_seqlens = ints(0, 1, 2, 3, 4).npu()
        out, lse = fa3_ops.flash_attn_with_kvcache(
            q,
            **cache,
            page_table=page_table,
            cache_seqlens=seqlens,
            cu_seqlens_q=cu_seqlens,
            **options,
        )
        for b in range(4):
            alone, alone_lse = fa3_ops.flash_attn_with_kvcache(
                q[b : b + 1],
                **cache,
                page_table=page_table[b : b + 1],
                cache_seqlens=seqlens[b : b + 1],
                cu_seqlens_q=ints(0, 1).npu(),
                **options,
            )
            assert torch.equal(out[b : b + 1].cpu(), alone.cpu())
            assert torch.equal(lse[:, b : b + 1].cpu(), alone_lse.cpu())

    def test_decode_is_prefill_is_training(self) -> None:
        cache, page_table = self.cache()
        length, last = 1100, 6
        k, v = (
            cache[name][page_table[0].long()].flatten(0, 1)[:length]
            for name in ("k_cache", "v_cache")
        )
        q = rand(last, 2, 16, dtype=torch.float16).npu()
        trained, _ = fa3_ops.flash_attn_varlen_func(
            *(q, k, v, ints(0, last).npu(), ints(0, length).npu(), last, length),
            causal=True,
            return_attn_probs=True,
        )
        for i in range(last):
            decoded = fa3_ops.flash_attn_with_kvcache(
                q[None, i : i + 1],
                **cache,
                page_table=page_table[:1],
                cache_seqlens=ints(length - last + 1 + i).npu(),
                causal=True,
            )
            assert torch.equal(decoded[0, 0].cpu(), trained[i].cpu())
