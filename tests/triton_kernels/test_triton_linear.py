"""linear in Triton's interpreter, whose products of tiles are numpy's."""

from __future__ import annotations

from typing import Any

import pytest
import small_operators as check
import torch
from hypothesis import given
from sample_inputs import rand
from strategies import examples, linear_calls
from torch import Tensor

import fa3_ops

ops = torch.ops.fa3npu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class TestLinear:
    @examples(40)
    @given(linear_calls(DTYPES, most_depth=513))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_linear(call, "cpu")

    @every_dtype
    @pytest.mark.parametrize("depth", [100, 128])
    def test_a_row_is_the_same_anywhere(self, dtype: torch.dtype, depth: int) -> None:
        check.check_a_row_of_linear_is_the_same_anywhere(dtype, 50, depth, "cpu")

    @every_dtype
    def test_strides_and_neighbours_change_nothing(self, dtype: torch.dtype) -> None:
        check.check_strides_and_neighbours_change_nothing_of_linear(dtype, "cpu")

    @every_dtype
    def test_a_rows_gradient_is_the_same_anywhere(self, dtype: torch.dtype) -> None:
        check.check_a_rows_gradient_is_the_same_anywhere(dtype, "cpu")

    @pytest.mark.parametrize("rows", [2, 64])
    def test_error_of_float32_at_most_twice_pytorchs(self, rows: int) -> None:
        check.check_error_of_float32_at_most_twice_pytorchs(rows, 4096, "cpu")

    def test_tiles_of_rows_are_grouped_but_all_worked_off(self) -> None:
        x, weight = rand(64 * 9 + 1, 3), rand(130, 3)
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.t())

    def test_leading_dimensions(self) -> None:
        x, weight = rand(2, 0, 3, 8), rand(5, 8)
        assert ops.linear(x, weight).shape == (2, 0, 3, 5)
        x = rand(3, 2, 4, 8).transpose(0, 2)
        assert torch.equal(ops.linear(x, weight).flatten(0, 2), ops.linear(x.flatten(0, 2), weight))

    def test_gradients(self) -> None:
        given = [rand(*shape, grad=True) for shape in ((2, 3, 9), (7, 9), (7,))]
        dout = rand(2, 3, 7)
        got = torch.autograd.grad(fa3_ops.linear(*given), given, dout)
        want = torch.autograd.grad(torch.nn.functional.linear(*given), given, dout)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)

    def test_float64_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match=r"triton cannot .* dtype torch\.float64"):
            ops.linear(rand(2, 3).double(), rand(4, 3).double())

    def test_explained(self) -> None:
        explained = fa3_ops.explain(fa3_ops.linear, rand(2, 3), rand(4, 3))
        assert (explained.backend, explained.bitwise) == ("triton", True)

    def test_what_is_not_finite_stays_in_its_row_and_column(self) -> None:
        x, weight = rand(9, 40), rand(11, 40)
        want = ops.linear(x, weight)
        x[3, 39], weight[5, 0] = float("inf"), float("nan")
        out: Tensor = ops.linear(x, weight)
        assert out[:, 5].isnan().all()
        assert not out[3].isfinite().any()
        rest = torch.ones_like(want, dtype=torch.bool)
        rest[3], rest[:, 5] = False, False
        assert torch.equal(out[rest], want[rest])
