"""kvcache_append_ and kvcache_scatter_ in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import small_operators as check
import torch
from hypothesis import given
from sample_inputs import ints, rand
from strategies import NARROW_DTYPES, append_calls, examples, narrow_append_calls, scatter_calls

import fa3_ops

ops = torch.ops.fa3npu
TABLES = ("rotary_cos", "rotary_sin")


class TestAppend:
    @examples(25)
    @given(append_calls(most_keys=12))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_append(call, "cpu")

    @examples(25)
    @given(narrow_append_calls(most_rows=2))
    def test_random_calls_of_narrow_caches(self, call: dict[str, Any]) -> None:
        check.check_append(call, "cpu")

    def test_what_has_no_place_is_left_out(self) -> None:
        check.check_appends_leave_out_what_has_no_place("cpu")

    def test_new_keys_may_lie_in_the_cache(self) -> None:
        check.check_new_keys_may_lie_in_the_cache("cpu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_appended_keys_have_the_bits_of_apply_rotary(self, dtype: torch.dtype) -> None:
        check.check_appended_keys_have_the_bits_of_apply_rotary(dtype, "cpu")

    def test_the_composite(self) -> None:
        q, k = rand(2, 3, 4, 16), rand(2, 3, 2, 16)
        caches = rand(2, 2, 9, 2, 16)
        call = {"q": q, "k": k, "v": k, "cache_seqlens": ints(5, 2), "causal": True}
        want = caches.clone()
        with fa3_ops.use_backend("cpu"):
            want_out = fa3_ops.flash_attn_with_kvcache(k_cache=want[0], v_cache=want[1], **call)
        out = fa3_ops.flash_attn_with_kvcache(k_cache=caches[0], v_cache=caches[1], **call)
        assert torch.equal(caches, want)
        torch.testing.assert_close(out, want_out)

    @pytest.mark.parametrize(
        ("error", "message", "changes"),
        [
            (ValueError, r"k_cache must have shape \(num_pages", {"k_cache": rand(2, 9, 32)}),
            (ValueError, r"v_cache must have shape \(2, 9, 2, ", {"v_cache": rand(2, 8, 2, 16)}),
            (TypeError, "k must have dtype torch.float32 like", {"k": rand(2, 3, 2, 16).half()}),
            (ValueError, r"k must have shape \(2, seqlen_new, 2, 16\)", {"k": rand(3, 3, 2, 16)}),
            (ValueError, r"cache_seqlens must have shape", {"cache_seqlens": ints(1).view(1, 1)}),
            (ValueError, r"cache_batch_idx must have shape \(2,\)", {"cache_batch_idx": ints(1)}),
            (TypeError, "page_table must have dtype torch.int32", {"page_table": torch.ones(2, 2)}),
            (ValueError, "rotary_cos must reach", dict.fromkeys(TABLES, rand(0, 4))),
            (ValueError, "k_cache must have a contiguous last", {"k_cache": rand(2, 9, 16, 2).mT}),
            (ValueError, "v_cache must have", {"v_cache": rand(2, 9, 1, 16).expand(-1, -1, 2, -1)}),
        ],
    )  # fmt: skip
    def test_errors(self, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
        caches = {"k_cache": rand(2, 9, 2, 16), "v_cache": rand(2, 9, 2, 16)}
        call = {"k": rand(2, 3, 2, 16), "v": rand(2, 3, 2, 16), **caches}
        with pytest.raises(error, match=f"^{message}"):
            ops.kvcache_append_(**(call | {"cache_seqlens": ints(1, 2)} | changes))


class TestScatter:
    @examples(40)
    @given(scatter_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_scatter(call, "cpu")

    def test_what_has_no_place_is_left_out(self) -> None:
        check.check_scatters_leave_out_what_has_no_place("cpu")

    @pytest.mark.parametrize("cache_dtype", NARROW_DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_every_number(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        check.check_every_number(dtype, cache_dtype, "cpu")

    def test_a_write_raises_the_versions(self) -> None:
        check.check_a_write_raises_the_versions("cpu")

    def test_an_inference_tensor_is_refused(self) -> None:
        with torch.inference_mode():
            cache = rand(2, 9, 2, 16)
        with pytest.raises(RuntimeError, match="inference tensor"):
            ops.kvcache_scatter_(*(rand(1, 2, 16),) * 2, cache, cache, torch.tensor([0]))
