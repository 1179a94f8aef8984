"""linear: its numbers against float64 and PyTorch's own, and the bits of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from sample_inputs import rand
from strategies import LINEAR_DTYPES, RELATIVE, assert_linear, examples, linear_calls, threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fa3_ops
from fa3_ops import reference

ops = torch.ops.fa3npu
every_dtype = pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=str)


def assert_rows(out: Tensor, call: dict[str, Any]) -> None:
    """Every row is what it is alone."""
    for i, row in enumerate(call["x"]):
        alone = ops.linear(row[None], call["weight"], call["bias"])
        assert torch.equal(alone[0], out[i])


class TestLinear:
    @examples(150)
    @given(linear_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        out = ops.linear(**call)
        assert_linear(out, call)
        assert_rows(out, call)
        plain = {n: None if x is None else x.contiguous() for n, x in call.items()}
        assert torch.equal(ops.linear(**plain), out)

    @every_dtype
    @pytest.mark.parametrize(("columns", "depth"), [(200, 3000), (64, 64)])
    def test_a_row_is_the_same_anywhere(self, dtype: torch.dtype, columns: int, depth: int) -> None:
        weight, bias = rand(columns, depth, dtype=dtype), rand(columns, dtype=dtype)
        row, others = rand(depth, dtype=dtype), rand(600, depth, dtype=dtype)
        want = fa3_ops.linear(row, weight, bias)
        assert want.shape == (columns,)
        for rows in (1, 2, 3, 4, 5, 16, 17, 31, 33, 64, 128, 129, 600):
            for place in {0, rows // 2, rows - 1}:
                x = others[:rows].clone()
                x[place] = row
                for count in (1, 3, 4):
                    with threads(count):
                        assert torch.equal(fa3_ops.linear(x, weight, bias)[place], want)

    @every_dtype
    def test_strides_and_alignment_change_nothing(self, dtype: torch.dtype) -> None:
        shapes = {"x": (40, 1100), "weight": (130, 1100)}
        plain = {name: rand(*shape, dtype=dtype) for name, shape in shapes.items()}
        want = ops.linear(**plain)
        for name, x in plain.items():
            rows, columns = x.shape
            offset = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
            wide = torch.cat((x, x.new_zeros(rows, 3)), 1)[:, :columns]
            for view in (x.t().contiguous().t(), offset, wide, x.repeat_interleave(2, 1)[:, ::2]):
                assert torch.equal(view, x)
                assert torch.equal(ops.linear(**plain | {name: view}), want)

    @every_dtype
    def test_columns_do_not_depend_on_their_number(self, dtype: torch.dtype) -> None:
        x, weight = rand(20, 700, dtype=dtype), rand(210, 700, dtype=dtype)
        want = ops.linear(x, weight)
        for begin, end in ((0, 1), (0, 210), (5, 106), (97, 98), (100, 210)):
            assert torch.equal(ops.linear(x, weight[begin:end]), want[:, begin:end])

    @pytest.mark.parametrize("depth", [64, 512, 1024, 4096, 8192])
    @pytest.mark.parametrize("rows", [2, 64])
    def test_error_of_float32_at_most_twice_pytorchs(self, depth: int, rows: int) -> None:
        """The root of the mean square over 2048 elements or more, which chance does not move much,
        both for sums around zero and for sums that grow."""
        torch.manual_seed(depth)
        for make in (torch.randn, torch.rand):
            x, weight = make(rows, depth), make(1024, depth)
            want = reference.linear(x, weight)
            ours, pytorchs = (
                (y.double() - want).square().mean().sqrt()
                for y in (ops.linear(x, weight), F.linear(x, weight))
            )
            assert 0 < ours <= 2 * pytorchs

    @every_dtype
    def test_what_is_not_finite_stays_in_its_row_and_column(self, dtype: torch.dtype) -> None:
        x, weight = rand(9, 40, dtype=dtype), rand(11, 40, dtype=dtype)
        want = ops.linear(x, weight)
        x[3, 39], weight[5, 0] = float("inf"), float("nan")
        out = ops.linear(x, weight)
        assert out[:, 5].isnan().all()
        assert not out[3].isfinite().any()
        rest = torch.ones_like(want, dtype=torch.bool)
        rest[3], rest[:, 5] = False, False
        assert torch.equal(out[rest], want[rest])

    def test_leading_dimensions(self) -> None:
        x, weight = rand(2, 0, 3, 8), rand(5, 8)
        assert ops.linear(x, weight).shape == (2, 0, 3, 5)
        x = rand(3, 2, 4, 8).transpose(0, 2)
        assert torch.equal(ops.linear(x, weight).flatten(0, 2), ops.linear(x.flatten(0, 2), weight))

    def test_without_a_depth_the_bias_is_left(self) -> None:
        bias = rand(4)
        for dtype in (torch.float32, torch.bfloat16):  # which has kernels of its own
            x, weight, bias = rand(3, 0).to(dtype), rand(4, 0).to(dtype), bias.to(dtype)
            assert torch.equal(ops.linear(x, weight, bias), bias.expand(3, 4))
            assert torch.equal(ops.linear(x, weight), torch.zeros(3, 4, dtype=dtype))

    @pytest.mark.parametrize(
        ("error", "message", "changes"),
        [
            (TypeError, "x must have one of the dtypes torch.float32", {"x": torch.ones(2, 8).int()}),
            (TypeError, "x must be a tensor, got None", {"x": None}),
            (ValueError, r"x must have shape \(..., in_features\), got \(\)", {"x": torch.ones(())}),
            (ValueError, r"weight must have shape \(out_features, 8\), got \(5, 7\)", {"weight": rand(5, 7)}),
            (ValueError, r"weight must have shape \(out_features, 8\), got \(8,\)", {"weight": rand(8)}),
            (TypeError, "weight must have dtype torch.float32 like x, got", {"weight": rand(5, 8).half()}),
            (ValueError, r"bias must have shape \(5,\), got \(1, 5\)", {"bias": rand(1, 5)}),
            (TypeError, "bias must have dtype torch.float32 like x, got", {"bias": rand(5).double()}),
            (ValueError, "bias must be on the device of x, cpu, got meta", {"bias": rand(5).to("meta")}),
        ],
        ids=str,
    )  # fmt: skip
    def test_errors(self, error: type[Exception], message: str, changes: dict[str, Any]) -> None:
        call = {"x": rand(2, 8), "weight": rand(5, 8), "bias": rand(5)}
        with pytest.raises(error, match=f"^{message}"):
            fa3_ops.linear(**(call | changes))

    @pytest.mark.parametrize(
        ("message", "changes"),
        [
            ("x must be float64, float32", {"x": torch.ones(2, 8).int()}),
            ("x must have a dimension", {"x": torch.ones(())}),
            ("weight must have shape", {"weight": rand(5, 7)}),
            ("weight must have shape", {"weight": rand(8)}),
            ("weight must have the dtype of x", {"weight": rand(5, 8).half()}),
            ("bias must have shape", {"bias": rand(4)}),
            ("bias must have shape", {"bias": rand(5, 1)}),
            ("bias must have the dtype of x", {"bias": rand(5).double()}),
        ],
        ids=str,
    )
    def test_the_kernel_checks_too(self, message: str, changes: dict[str, Any]) -> None:
        call = {"x": rand(2, 8), "weight": rand(5, 8), "bias": rand(5)}
        with pytest.raises(RuntimeError, match=message):
            ops.linear(**(call | changes))


def inputs(*shape: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (shape, (columns, shape[-1]), (columns,))
    return [rand(*shape, dtype=dtype, grad=True) for shape in shapes]


class TestLinearGradient:
    def test_gradcheck(self) -> None:
        given = inputs(2, 3, 5, columns=4, dtype=torch.float64)
        assert torch.autograd.gradcheck(ops.linear, given)
        assert torch.autograd.gradgradcheck(ops.linear, given)
        assert torch.autograd.gradcheck(ops.linear, given[:2])

    @every_dtype
    def test_as_pytorchs_in_float64(self, dtype: torch.dtype) -> None:
        given = inputs(3, 11, 70, columns=50, dtype=dtype)
        dout = rand(3, 11, 50, dtype=dtype)
        got = torch.autograd.grad(fa3_ops.linear(*given), given, dout)
        doubles = [x.detach().double().requires_grad_() for x in given]
        want = torch.autograd.grad(F.linear(*doubles), doubles, dout.double())
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(
                x.double(),
                y,
                rtol=2 * RELATIVE[dtype],
                atol=2e-2 if dtype == torch.bfloat16 else 2e-3,
            )

    @every_dtype
    def test_a_rows_gradient_is_the_same_anywhere(self, dtype: torch.dtype) -> None:
        x, weight, _ = inputs(150, 300, columns=700, dtype=dtype)
        dout = rand(150, 700, dtype=dtype)
        (dx,) = torch.autograd.grad(ops.linear(x, weight), x, dout)
        for rows in (slice(0, 1), slice(3, 7), slice(20, 150)):
            part = x[rows].detach().requires_grad_()
            (got,) = torch.autograd.grad(ops.linear(part, weight), part, dout[rows])
            assert torch.equal(got, dx[rows])

    @pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
    def test_only_what_is_needed_is_computed(self, wanted: tuple[int, ...]) -> None:
        given = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs(6, 8, columns=5))]
        out = ops.linear(*given)
        with FlopCounterMode(display=False) as flops:
            out.sum().backward()
        products = sum(i in wanted for i in (0, 1))
        assert flops.get_total_flops() == 2 * products * 6 * 8 * 5
        assert [x.grad is not None for x in given] == [i in wanted for i in range(3)]

    def test_vmap_and_per_sample_gradients(self) -> None:
        x, weight, bias = (t.detach() for t in inputs(4, 3, 8, columns=5))
        assert torch.equal(
            torch.vmap(ops.linear, (0, None, None))(x, weight, bias), ops.linear(x, weight, bias)
        )
        assert torch.equal(
            torch.vmap(ops.linear, (1, None, None), 1)(x, weight, bias), ops.linear(x, weight, bias)
        )
        weights = rand(4, 5, 8)
        each = torch.stack([ops.linear(x[i], weights[i]) for i in range(4)])
        assert torch.equal(torch.vmap(ops.linear)(x, weights), each)

        def loss(weight: Tensor, x: Tensor) -> Tensor:
            return fa3_ops.linear(x, weight, bias).square().sum()

        got = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        want = torch.stack([torch.func.grad(loss)(weight, sample) for sample in x])
        torch.testing.assert_close(got, want)

    def test_forward_mode_is_refused_by_name(self) -> None:
        x, weight, _ = (t.detach() for t in inputs(4, 8, columns=5))
        with pytest.raises(NotImplementedError, match="linear has no forward-mode"):
            torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (x,))


class TestLinearAround:
    """Compilers, autocast, backends."""

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled(self, backend: str) -> None:
        torch._dynamo.reset()
        given = inputs(6, 8, columns=5)
        compiled = torch.compile(fa3_ops.linear, backend=backend, fullgraph=True, dynamic=True)
        for rows in (6, 9):
            x = rand(rows, 8, grad=True)
            got, want = compiled(x, *given[1:]), fa3_ops.linear(x, *given[1:])
            assert torch.equal(got, want)
            arguments = (x, *given[1:])
            for a, b in zip(
                *(torch.autograd.grad(y.square().sum(), arguments) for y in (got, want)),
                strict=True,
            ):
                torch.testing.assert_close(a, b)

    def test_exported(self) -> None:
        class Layer(torch.nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return fa3_ops.linear(x, self.weight, self.bias)

        layer = Layer(8, 5)
        rows = {0: torch.export.Dim("rows")}
        program = torch.export.export(layer, (rand(3, 8),), dynamic_shapes=(rows,))
        assert "fa3npu.linear.default" in [str(n.target) for n in program.graph.nodes]
        x = rand(7, 8)
        assert torch.equal(program.module()(x), layer(x))

    def test_autocast(self) -> None:
        given = inputs(6, 8, columns=5)
        with torch.autocast("cpu", torch.bfloat16):
            out = fa3_ops.linear(*given)
            raw = ops.linear(*given)
        assert torch.equal(out, ops.linear(*(x.bfloat16() for x in given)))
        assert torch.equal(raw, out)
        assert [x.dtype for x in torch.autograd.grad(out.sum(), given)] == [torch.float32] * 3

    def test_flops(self) -> None:
        x, weight, bias = (t.detach() for t in inputs(2, 3, 8, columns=5))
        with FlopCounterMode(display=False) as flops:
            ops.linear(x, weight, bias)
        assert flops.get_total_flops() == 2 * 2 * 3 * 8 * 5

    def test_backends(self) -> None:
        given = inputs(6, 8, columns=5)
        ours = fa3_ops.explain(fa3_ops.linear, *given)
        assert (ours.backend, ours.bitwise) == ("cpu", True)
        with fa3_ops.use_backend("torch"):
            explained = fa3_ops.explain(fa3_ops.linear, *given)
            assert (explained.backend, explained.bitwise) == ("torch", False)
            assert torch.equal(fa3_ops.linear(*given), F.linear(*given))
