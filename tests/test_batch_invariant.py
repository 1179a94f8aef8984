"""Products and activations of whole models: every row as it is alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from sample_inputs import rand
from strategies import threads
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fa3_ops
from fa3_ops.batch_invariant import BatchInvariantMode, Linear, convert

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEPTH = 1030  # PyTorch's products depend on the number of rows there
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Products of x (rows, DEPTH), and the same by fa3_ops.linear.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear by name": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "mm": lambda x, w, b: torch.mm(x, w.t()) + b,
    "method mm": lambda x, w, b: x.mm(w.t()) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "method addmm": lambda x, w, b: b.addmm(x, w.t()),
    "addmm, halves": lambda x, w, b: torch.addmm(2 * b, x, 2 * w.t(), beta=0.5, alpha=0.5),
    "addmm, no input": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0) + b,
    "matmul": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "@": lambda x, w, b: x @ w.t() + b,
    "@ vector": lambda x, w, b: torch.stack([x @ row for row in w], -1) + b,
    "bmm": lambda x, w, b: torch.bmm(x[:, None], w.t().expand(len(x), -1, -1))[:, 0] + b,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "method sigmoid": Tensor.sigmoid,
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class Block(nn.Module):
    """A gated layer of an odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DEPTH, 101), nn.Linear(DEPTH, 101, bias=False)
        self.down, self.act = nn.Linear(101, 40), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with threads(2):
        yield


class TestMode:
    @every_dtype
    @pytest.mark.parametrize("keepdim", [False, True])
    def test_means_where_sums_are_not_steady(
        self, dtype: torch.dtype, keepdim: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fa3_ops.batch_invariant, "_UNSTEADY", ["cpu"])
        x = rand(20, 3, DEPTH, dtype=dtype).requires_grad_()
        with FlopCounterMode(display=False) as flops, BatchInvariantMode():
            mean = x.mean(-1, keepdim=keepdim)
            named = torch.mean(input=x, dim=[2], keepdim=keepdim)
            assert torch.equal(mean[4:5], x[4:5].mean(-1, keepdim))
            others = x.mean(), x.mean(1), x.mean((1, 2)), x.mean(-1, dtype=torch.float64)
        assert flops.get_total_flops() == 2 * 3 * (20 + 20 + 1) * DEPTH
        assert torch.equal(mean, named)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mean, x.mean(-1, keepdim=keepdim), rtol=4 * eps, atol=4 * eps)
        mean.sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.full_like(x, 1 / DEPTH))
        expected = x.mean(), x.mean(1), x.mean((1, 2)), x.mean(-1, dtype=torch.float64)
        assert all(map(torch.equal, others, expected))

    def test_means_on_cpu_are_pytorchs(self) -> None:
        x = rand(20, DEPTH)
        with FlopCounterMode(display=False) as flops, BatchInvariantMode():
            assert torch.equal(x.mean(-1), torch.mean(x.detach(), -1))
        assert flops.get_total_flops() == 0

    @every_dtype
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_products(self, name: str, dtype: torch.dtype) -> None:
        product = PRODUCTS[name]
        x, w, b = rand(20, DEPTH, dtype=dtype), rand(7, DEPTH, dtype=dtype), rand(7, dtype=dtype)
        with FlopCounterMode(display=False) as flops, BatchInvariantMode():
            out = product(x, w, b)
            for i in range(len(x)):
                assert torch.equal(product(x[i : i + 1], w, b)[0], out[i])
        (counts,) = [count for scope, count in flops.flop_counts.items() if scope == "Global"]
        assert set(counts) == {torch.ops.fa3npu.linear}
        tolerance = {"rtol": 1e-2, "atol": 1.0 if dtype == torch.bfloat16 else 0.1}
        torch.testing.assert_close(out, product(x, w, b), **tolerance)

    def test_pytorchs_own_rows_differ(self) -> None:
        """What all this is for; where it fails, fa3_ops.linear has nothing to add."""
        x, w = rand(20, DEPTH), rand(40, DEPTH)
        assert not torch.equal(F.linear(x[:1], w)[0], F.linear(x, w)[0])
        with BatchInvariantMode():
            assert torch.equal(F.linear(x[:1], w)[0], F.linear(x, w)[0])

    @every_dtype
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("width", [7, 33, 100, 1001])
    def test_activations(self, name: str, width: int, dtype: torch.dtype) -> None:
        f = ACTIVATIONS[name]
        x = (4 * torch.randn(70, 2 * width)).to(dtype)
        x[:2, 3] = torch.tensor([float("inf"), -float("inf")])
        unit = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        half = x[:, :width]  # strided, as of a fused projection
        for gate in (half, half.contiguous()):
            with BatchInvariantMode():
                out = f(gate)
                alone = torch.cat([f(row.clone()) for row in gate.split(1)])
            torch.testing.assert_close(alone, out, rtol=0, atol=0, equal_nan=True)
            want = f(gate.double()).to(dtype)
            torch.testing.assert_close(out, want, rtol=2 * unit, atol=1e-6, equal_nan=True)

    @every_dtype
    def test_autocast(self, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            return
        x, layer = rand(20, DEPTH), nn.Linear(DEPTH, 9)
        with BatchInvariantMode(), torch.autocast("cpu", dtype):
            out = layer(x)
            assert torch.equal(layer(x[3:4])[0], out[3])
        assert out.dtype == dtype

    def test_gradients_of_rows(self) -> None:
        block, x = Block(), rand(20, DEPTH, grad=True)
        with BatchInvariantMode():
            (dx,) = torch.autograd.grad(block(x).sum(), x)
            part = x.detach()[4:6].requires_grad_()
            (got,) = torch.autograd.grad(block(part).sum(), part)
        assert torch.equal(got, dx[4:6])

    @pytest.mark.parametrize("inside", [True, False])
    def test_compiled(self, inside: bool) -> None:
        block, x = Block(), rand(20, DEPTH)

        def with_mode(x: Tensor) -> Tensor:
            with BatchInvariantMode():
                return block(x) @ x.new_ones(40, 3)

        def without(x: Tensor) -> Tensor:
            return block(x) @ x.new_ones(40, 3)

        want = with_mode(x)
        if inside:
            got = torch.compile(with_mode, fullgraph=True, backend="aot_eager")(x)
        else:
            with BatchInvariantMode():
                got = torch.compile(without, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(got, want)

    def test_what_is_left_to_pytorch(self) -> None:
        ints = torch.arange(6).view(2, 3)
        x, w = rand(20, 64), rand(64, 5)
        out = torch.empty(20, 5)
        with BatchInvariantMode():
            assert torch.equal(ints @ ints.t(), ints.mm(ints.t()))
            torch.mm(x, w, out=out)
            three = torch.matmul(x[None], w[None])
            assert torch.bmm(rand(0, 2, 3), rand(0, 3, 4)).shape == (0, 2, 4)
            with pytest.raises(ValueError, match="weight must have shape"):
                F.linear(x, w)
        torch.testing.assert_close(out, x @ w)
        torch.testing.assert_close(three[0], x @ w)


class TestConvert:
    def test_layers(self) -> None:
        class Other(nn.Linear):
            pass

        model = nn.ModuleDict({"block": Block(), "other": Other(3, 4)})
        before = copy.deepcopy(model)
        names = list(model.state_dict())
        assert convert(model) is model
        kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert kinds.pop("other") is Other
        assert set(kinds.values()) == {Linear}
        assert list(model.state_dict()) == names
        x = rand(20, DEPTH)
        torch.testing.assert_close(model["block"](x), before["block"](x), rtol=1e-4, atol=1e-4)
        gate = model["block"].gate
        assert torch.equal(gate(x), fa3_ops.linear(x, gate.weight, gate.bias))
        assert torch.equal(gate(x[:1])[0], gate(x)[0])
        assert torch.equal(copy.deepcopy(gate)(x), gate(x))

    def test_a_layer_itself(self) -> None:
        layer = nn.Linear(8, 4, bias=False)
        assert type(convert(layer)) is Linear
