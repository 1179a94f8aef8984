"""apply_rotary in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import small_operators as check
import torch
from hypothesis import given
from sample_inputs import ints, rand, rotary
from strategies import examples, rotary_calls

ops = torch.ops.fa3npu
TABLES = ("rotary_cos", "rotary_sin")


class TestApplyRotary:
    @examples(40)
    @given(rotary_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_rotary(call, "cpu")

    def test_positions_are_bounded_by_the_tables(self) -> None:
        check.check_positions_are_bounded_by_the_tables("cpu")

    @pytest.mark.parametrize("shape", [(2, 0, 3, 8), (0, 2, 3, 8), (2, 3, 0, 8)], ids=str)
    def test_nothing_to_rotate(self, shape: tuple[int, ...]) -> None:
        out = ops.apply_rotary(rand(*shape), *rotary(9, 8), torch.zeros(shape[0]).int())
        assert out.shape == shape

    def test_rows_of_no_sequence_are_copied(self) -> None:
        x = rand(4, 3, 8)
        assert torch.equal(ops.apply_rotary(x, *rotary(9, 8), ints(), ints(0)), x)

    @pytest.mark.parametrize(
        ("error", "message", "changes"),
        [
            (ValueError, r"x must have shape \(batch_size, seqlen", {"x": rand(3, 2, 8)}),
            (ValueError, r"rotary_seqlens must have shape \(2,\)", {"rotary_seqlens": ints(1)}),
            (ValueError, "rotary_dim must be at most headdim, 7", {"x": rand(2, 3, 2, 7)}),
            (TypeError, "rotary_cos must have dtype", {"rotary_cos": rand(9, 4).half()}),
            (ValueError, "rotary_cos must reach", dict.fromkeys(TABLES, rand(0, 4))),
        ],
    )  # fmt: skip
    def test_errors(self, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
        cos, sin = rotary(9, 8)
        call = {"x": rand(2, 3, 2, 8), "rotary_cos": cos, "rotary_sin": sin}
        with pytest.raises(error, match=f"^{message}"):
            ops.apply_rotary(**(call | {"rotary_seqlens": ints(0, 1)} | changes))
