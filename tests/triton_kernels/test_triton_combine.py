"""flash_attn_combine in Triton's interpreter, and get_scheduler_metadata beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import small_operators as check
import torch
from hypothesis import given
from sample_inputs import ints, rand
from strategies import combine_calls, examples

import fa3_ops

ops = torch.ops.fa3npu


class TestFlashAttnCombine:
    @examples(50)
    @given(combine_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_combine(call, "cpu")

    def test_rows_are_merged_alone(self) -> None:
        check.check_rows_are_merged_alone("cpu")

    def test_no_part_sees_a_key(self) -> None:
        outs = torch.full((2, 1, 3, 1, 4), math.nan)
        lses = torch.tensor([-math.inf, math.inf]).view(2, 1, 1, 1).expand(2, 1, 3, 1)
        out, lse = fa3_ops.flash_attn_combine(outs, lses)
        assert torch.equal(out, torch.zeros(1, 3, 1, 4))
        assert torch.equal(lse, torch.full((1, 3, 1), -math.inf))

    def test_nan_in_a_part_that_counts_reaches_its_row_alone(self) -> None:
        outs, lses = rand(3, 5, 2, 8), rand(3, 5, 2)
        want, _ = ops.flash_attn_combine(outs, lses)
        outs[1, 2, 0, 3] = lses[2, 4, 1] = math.nan
        out, lse = ops.flash_attn_combine(outs, lses)
        seen = torch.zeros(5, 2, 8, dtype=torch.bool)
        seen[2, 0, 3], seen[4, 1] = True, True
        assert torch.equal(out.isnan(), seen)
        assert torch.equal(out[~seen], want[~seen])
        assert lse.isnan().nonzero().tolist() == [[4, 1]]

    @pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8)], ids=str)
    def test_nothing_to_merge(self, shape: tuple[int, ...]) -> None:
        out, lse = ops.flash_attn_combine(torch.zeros(shape), torch.zeros(shape[:-1]))
        assert torch.equal(out, torch.zeros(shape[1:]))
        assert torch.equal(lse, torch.full(shape[1:-1], -math.inf))

    @pytest.mark.parametrize(
        ("error", "message", "arguments"),
        [
            (ValueError, r"out_partial must have shape \(num_splits", (rand(3, 8), rand(3))),
            (ValueError, r"lse_partial must have shape", (rand(3, 4, 2, 8), rand(3, 4, 1))),
            (TypeError, "out_partial must have", (rand(3, 4, 2, 8).half(), rand(3, 4, 2))),
            (TypeError, "out_dtype must be", (rand(3, 4, 2, 8), rand(3, 4, 2), torch.int32)),
        ],
    )
    def test_errors(self, error: type[Exception], message: str, arguments: Any) -> None:
        with pytest.raises(error, match=f"^{message}"):
            ops.flash_attn_combine(*arguments)


class TestGetSchedulerMetadata:
    def test_chunks_of_the_keys(self) -> None:
        check.check_metadata("cpu")

    def test_too_few_lengths(self) -> None:
        with pytest.raises(ValueError, match="cache_seqlens must have at least 4 elements"):
            ops.get_scheduler_metadata(4, 1, 9, 8, 2, 64, ints(1, 2, 3), torch.half)
