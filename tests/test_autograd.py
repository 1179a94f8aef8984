"""What autograd, torch.func and compilers of both are promised: of writes what index_put_ and
torch.mul(out=) keep, of derivatives the right one or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import SAMPLES, appending, cached, dense, ints, rand, varlen
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import fa3_ops
import fa3_ops.v2
import fa3_ops.v4

ops = torch.ops.fa3npu
CACHES = ("k_cache", "v_cache")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def append() -> dict[str, Any]:
    call = appending(1)
    return {name: call[name] for name in ("k", "v", *CACHES, "cache_seqlens")}


def scatter() -> dict[str, Any]:
    call = append() | {"slot_mapping": ints(3, 9)}
    del call["cache_seqlens"]
    return call | {name: call[name][:, 0] for name in ("k", "v")}


def paged_varlen() -> dict[str, Any]:
    pages = {"k": rand(4, 4, 2, 16), "v": rand(4, 4, 2, 16), "seqused_k": ints(5, 2)}
    return varlen(**pages, block_table=ints(0, 3, 2, 1).view(2, 2), cu_seqlens_k=None)


# What writes: a callable, its arguments, the names of what is written.
WRITES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "kvcache_append_": (ops.kvcache_append_, append, CACHES),
    "kvcache_scatter_": (ops.kvcache_scatter_, scatter, CACHES),
    "scatter function": (fa3_ops.kvcache_scatter_, scatter, CACHES),
    "composite": (ops.flash_attn_with_kvcache, partial(appending, 1), CACHES),
    "composite.out": (
        ops.flash_attn_with_kvcache.out,
        lambda: appending(1, out=torch.zeros(2, 1, 4, 16)),
        (*CACHES, "out"),
    ),
    "flash_attn_kvcache.out": (
        ops.flash_attn_kvcache.out,
        lambda: cached(1, out=torch.zeros(2, 1, 4, 16)),
        ("out",),
    ),
    "flash_attn_varlen_func.out": (
        ops.flash_attn_varlen_func.out,
        lambda: varlen(out=torch.zeros(7, 4, 16)),
        ("out",),
    ),
    "function": (fa3_ops.flash_attn_with_kvcache, partial(appending, 1), CACHES),
    "function, out": (
        fa3_ops.flash_attn_with_kvcache,
        lambda: cached(1, out=torch.zeros(2, 1, 4, 16)),
        ("out",),
    ),
    "varlen function, out": (
        fa3_ops.flash_attn_varlen_func,
        lambda: varlen(out=torch.zeros(7, 4, 16)),
        ("out",),
    ),
    "paged varlen function, out": (
        fa3_ops.flash_attn_varlen_func,
        lambda: paged_varlen() | {"out": torch.zeros(7, 4, 16)},
        ("out",),
    ),
    "v2": (
        fa3_ops.v2.flash_attn_with_kvcache,
        partial(appending, 1),
        CACHES,
    ),
}
every_write = pytest.mark.parametrize(
    ("write", "inputs", "written"), WRITES.values(), ids=WRITES.keys()
)
modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def maybe_compiled(f: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f


class TestWrites:
    @every_write
    @modes
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_versions_rise(
        self, write: Any, inputs: Any, written: tuple[str, ...], mode: Any, compiled: bool
    ) -> None:
        call = inputs()
        before = {name: x._version for name, x in call.items() if isinstance(x, Tensor)}
        with mode():
            maybe_compiled(lambda: write(**call), compiled)()
        for name, version in before.items():
            assert (call[name]._version > version) == (name in written), name

    @every_write
    @modes
    def test_a_backward_that_needs_what_was_overwritten_is_refused(
        self, write: Any, inputs: Any, written: tuple[str, ...], compiled: bool
    ) -> None:
        for name in written:
            call = inputs()
            weight = torch.ones_like(call[name], requires_grad=True)
            total = (call[name][:] * weight).sum()  # of a view: versions are those of the memory
            with torch.no_grad():
                maybe_compiled(lambda call=call: write(**call), compiled)()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()

    @every_write
    @modes
    @pytest.mark.parametrize("view", [False, True])
    def test_a_leaf_that_requires_grad_is_refused(
        self, write: Any, inputs: Any, written: tuple[str, ...], view: bool, compiled: bool
    ) -> None:
        for name in written:
            call = inputs()
            leaf = call[name].requires_grad_()
            before = leaf.detach().clone()
            call[name] = leaf[:] if view else leaf
            with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="grad"):
                maybe_compiled(lambda call=call: write(**call), compiled)()
            assert torch.equal(leaf, before)
            call[name] = leaf.detach() if compiled else leaf
            with torch.no_grad():  # as PyTorch: nobody records
                write(**call)

    @every_write
    @modes
    def test_an_inference_tensor_is_refused_outside_of_inference_mode(
        self, write: Any, inputs: Any, written: tuple[str, ...], compiled: bool
    ) -> None:
        for name in written:
            call = inputs()
            with torch.inference_mode():
                call[name] = call[name].clone()
            before = {n: call[n].clone() for n in written}
            with pytest.raises(RuntimeError, match=r"[Ii]nference"):
                maybe_compiled(lambda call=call: write(**call), compiled)()
            if not compiled:  # where PyTorch's own write comes before its refusal
                assert torch.equal(call[name], before[name])
            with torch.inference_mode():
                write(**call)

    @every_write
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_a_lazily_negated_tensor_is_refused(
        self, write: Any, inputs: Any, written: tuple[str, ...], mode: Any
    ) -> None:
        for name in written:
            with mode():
                call = inputs()
                before = {n: call[n].clone() for n in written}
                with pytest.raises(ValueError, match=f"{name} is written and must not be a lazily"):
                    write(**(call | {name: torch._neg_view(call[name])}))
            for n in written:
                assert torch.equal(call[n], before[n])

    @every_write
    def test_lazily_negated_inputs(self, write: Any, inputs: Any, written: tuple[str, ...]) -> None:
        call = inputs()
        read = [n for n in ("q", "k", "v") if call.get(n) is not None]
        want = call | {n: -call[n] for n in read} | {n: call[n].clone() for n in written}
        write(**want)
        write(**(call | {n: torch._neg_view(call[n]) for n in read}))
        for n in written:
            assert torch.equal(call[n], want[n])

    def test_a_refused_append_leaves_the_version(self) -> None:
        call = appending(1, cache_seqlens=ints(8, 2))
        with pytest.raises(ValueError, match="cache_seqlens"):
            fa3_ops.flash_attn_with_kvcache(**call)
        assert call["k_cache"]._version == 0

    @pytest.mark.parametrize("name", ["flash_attn_kvcache.out", "flash_attn_varlen_func.out"])
    def test_out_has_no_gradient(self, name: str) -> None:
        write, inputs, _ = WRITES[name]
        call = inputs()
        call["q"].requires_grad_()
        with pytest.raises(RuntimeError, match=r"out=.* automatic differentiation, but q requires"):
            write(**call)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = ops.flash_attn_func(q, k, v, 0.3, True)[0]
    return out


def varlen_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, packed."""
    ends = ints(0, q.shape[1])
    lengths = (ends, ends, q.shape[1], q.shape[1])
    out: Tensor = ops.flash_attn_varlen_func(q[0], k[0], v[0], *lengths, None, None, 0.3, True)[0]
    return out[None]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    swapped = (x.transpose(-3, -2) for x in (q, k, v))
    out = scaled_dot_product_attention(*swapped, is_causal=True, scale=0.3)
    return out.transpose(-3, -2)


def loss(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return f(*inputs).square().sum()


def transforms() -> dict[str, Callable[..., Any]]:
    qkv = rand(3, 1, 5, 2, 8)
    many = rand(3, 4, 1, 5, 2, 8)
    grads = {"argnums": (0, 1, 2)}
    return {
        "grad": lambda f: torch.func.grad(partial(loss, f), **grads)(*qkv),
        "vjp": lambda f: torch.func.vjp(f, *qkv)[1](qkv[0] + 1),
        "jacrev": lambda f: torch.func.jacrev(lambda *x: f(*x).sum(-1), **grads)(*qkv),
        "vmap": lambda f: torch.func.vmap(f)(*many),
        "vmap in_dims": lambda f: torch.func.vmap(f, in_dims=(1, None, -1), out_dims=2)(
            many[0].movedim(0, 1), many[1][0], many[2].movedim(0, -1)
        ),
        "per-sample gradients": lambda f: torch.func.vmap(
            torch.func.grad(partial(loss, f), **grads)
        )(*many),
        "nested vmap": lambda f: torch.func.vmap(torch.func.vmap(f))(
            *many[:, None].expand(3, 2, 4, 1, 5, 2, 8)
        ),
    }


class TestTransforms:
    @pytest.mark.parametrize("name", transforms())
    @pytest.mark.parametrize("f", [attention, varlen_attention])
    @pytest.mark.filterwarnings("ignore:.*batching rule.*")  # SDPA has none
    def test_as_sdpa(self, f: Any, name: str) -> None:
        transform = transforms()[name]
        torch.testing.assert_close(transform(f), transform(sdpa), atol=1e-5, rtol=1e-4)

    def test_gradients_of_sinks_per_sample(self) -> None:
        q, k, v = rand(3, 4, 1, 5, 2, 8)
        sinks = rand(4, 2)

        def f(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
            out: Tensor = ops.flash_attn_func(q, k, v, sinks=sinks)[0].square().sum()
            return out

        mapped = torch.func.vmap(torch.func.grad(f, argnums=3))(q, k, v, sinks)
        one_by_one = [torch.func.grad(f, argnums=3)(*x) for x in zip(q, k, v, sinks, strict=True)]
        torch.testing.assert_close(mapped, torch.stack(one_by_one))

    @pytest.mark.parametrize("op", SAMPLES, ids=str)
    def test_vmap_of_every_operator(self, op: torch._ops.OpOverload) -> None:
        """Two different calls at once are the two calls."""
        args, kwargs = next(iter(SAMPLES[op]()))
        names = [a.name for a in op._schema.arguments]
        call = dict(zip(names, args, strict=False)) | kwargs
        call = {n: x.detach() if isinstance(x, Tensor) else x for n, x in call.items()}
        floats = [n for n, x in call.items() if isinstance(x, Tensor) and x.is_floating_point()]
        both = {n: torch.stack((call[n], call[n] + 1)) for n in floats}
        if not floats:
            floats, both = ["cache_seqlens"], {"cache_seqlens": torch.stack((ints(9, 4),) * 2)}

        def one(*x: Tensor) -> Any:
            result = op(**call | dict(zip(floats, x, strict=True)))
            return x[2:4] if result is None else result  # the caches of an append

        mapped_inputs = [both[n].clone() for n in floats]
        if op._overloadname == "out":
            with pytest.raises(NotImplementedError, match="no vmap"):
                torch.func.vmap(one)(*mapped_inputs)
            return
        mapped = torch.func.vmap(one)(*mapped_inputs)
        singles = [one(*(both[n][i].clone() for n in floats)) for i in range(2)]
        if isinstance(mapped, Tensor):
            mapped, singles = (mapped,), [(x,) for x in singles]
        for got, *want in zip(mapped, *singles, strict=True):
            assert torch.equal(got, torch.stack(want))

    def test_vmap_does_not_let_all_write_one_cache(self) -> None:
        call = append()
        with pytest.raises(NotImplementedError, match=r"kvcache_append_ .* batched k_cache"):
            torch.func.vmap(lambda k: ops.kvcache_append_(**call | {"k": k}))(
                torch.stack((call["k"],) * 2)
            )

    def test_functions(self) -> None:
        q, k, v = rand(3, 4, 1, 5, 2, 8)
        got = torch.func.vmap(partial(fa3_ops.flash_attn_func, causal=True))(q, k, v)
        want = fa3_ops.flash_attn_func(*(x.flatten(0, 1) for x in (q, k, v)), causal=True)
        assert torch.equal(got.flatten(0, 1), want)
        k, v = k.clone(), v.clone()
        seqlens = torch.stack((ints(3),) * 4)
        got = torch.func.vmap(
            lambda q, k, v, n: fa3_ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=n)
        )(q, k, v, seqlens)
        want = fa3_ops.flash_attn_func(q[:, 0], k[:, 0, :3], v[:, 0, :3])
        assert torch.equal(got[:, 0], want)


class TestForwardMode:
    @pytest.mark.parametrize("op", SAMPLES, ids=str)
    def test_every_operator_refuses(self, op: torch._ops.OpOverload) -> None:
        args, kwargs = next(iter(SAMPLES[op]()))
        names = [a.name for a in op._schema.arguments]
        call = dict(zip(names, args, strict=False)) | kwargs
        call = {n: x.detach() if isinstance(x, Tensor) else x for n, x in call.items()}
        floats = [n for n, x in call.items() if isinstance(x, Tensor) and x.is_floating_point()]
        for name in floats:
            before = {n: x.clone() for n, x in call.items() if isinstance(x, Tensor)}
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    op(**call | {name: dual})
            for n, x in before.items():
                if n != "out":
                    assert torch.equal(call[n], x), n

    @pytest.mark.parametrize(
        ("function", "inputs"),
        [
            (fa3_ops.flash_attn_func, dense),
            (fa3_ops.flash_attn_varlen_func, varlen),
            (fa3_ops.flash_attn_with_kvcache, partial(cached, 1)),
            (fa3_ops.flash_attn_with_kvcache, partial(appending, 1)),
        ],
    )
    def test_functions_refuse(self, function: Any, inputs: Any) -> None:
        call = inputs()

        def f(q: Tensor) -> Any:
            return function(**call | {"q": q})

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(f, (call["q"],), (call["q"],))
        with forward_ad.dual_level():
            f(call["q"])  # no tangent, no objection
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                f(forward_ad.make_dual(call["q"], call["q"]))


class TestRefusedGradients:
    @modes
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    @pytest.mark.parametrize(
        "function", [ops.flash_attn_with_kvcache, fa3_ops.flash_attn_with_kvcache]
    )
    def test_of_decoding(self, function: Any, name: str, compiled: bool) -> None:
        """Nobody asks: it runs. Somebody asks: an error, whatever else is in the loss."""
        call = appending(1)
        want = function(**{n: x.clone() for n, x in call.items()})
        weight = torch.ones_like(call[name], requires_grad=True)

        def step(call: dict[str, Tensor], weight: Tensor) -> Any:
            return function(**call | {name: call[name] * weight})

        out = maybe_compiled(step, compiled)(call, weight)
        out, want = (x if isinstance(x, Tensor) else x[0] for x in (out, want))
        assert torch.equal(out, want)
        assert not call["k_cache"].requires_grad
        other = torch.ones(1, requires_grad=True)
        with pytest.raises(
            NotImplementedError, match="fa3_ops: flash_attn_kvcache has no backward"
        ):
            (out.sum() + other.sum()).backward()

    def test_of_a_cache(self) -> None:
        call = cached(1)
        call["k_cache"].requires_grad_()
        with pytest.raises(NotImplementedError, match="flash_attn_kvcache has no backward"):
            fa3_ops.flash_attn_with_kvcache(**call).sum().backward()

    @pytest.mark.parametrize("name", ["k", "v", "k_cache"])
    def test_of_the_append(self, name: str) -> None:
        call = append()
        call[name] = call[name] * torch.ones(1, requires_grad=True)
        before = call["k_cache"].detach().clone()
        with pytest.raises(NotImplementedError, match=f"kvcache_append_ .*: {name} must not"):
            ops.kvcache_append_(**call)
        assert torch.equal(call["k_cache"], before)

    @modes
    def test_of_what_is_no_input_of_the_model(self, compiled: bool) -> None:
        q, k, v = rand(3, 2, 5, 4, 16)
        slopes = torch.rand(4, requires_grad=True)

        def f(slopes: Tensor) -> Tensor:
            return ops.flash_attn_func(q, k, v, alibi_slopes=slopes)[0]

        out = maybe_compiled(f, compiled)(slopes)
        assert torch.equal(out, f(slopes.detach()))
        with pytest.raises(NotImplementedError, match="alibi_slopes of flash_attn_func has no"):
            out.sum().backward()

    @pytest.mark.parametrize("f", [attention, varlen_attention])
    def test_double_backward(self, f: Any) -> None:
        qkv = [x.requires_grad_() for x in rand(3, 1, 5, 2, 8)]
        (dq,) = torch.autograd.grad(loss(f, *qkv), qkv[0], create_graph=True)
        refused = r"flash_attn_(varlen_)?func_backward has no backward"
        with pytest.raises(NotImplementedError, match=refused):
            dq.sum().backward()
        with pytest.raises(NotImplementedError, match=refused):
            torch.func.grad(lambda q: torch.func.grad(partial(loss, f))(q, *qkv[1:]).sum())(
                qkv[0].detach()
            )

    def test_in_inductor(self) -> None:
        call = appending(1)
        weight = torch.ones(1, requires_grad=True)
        step = torch.compile(
            lambda w: fa3_ops.flash_attn_with_kvcache(**call | {"k": call["k"] * w}), fullgraph=True
        )
        out = step(weight)
        with pytest.raises(NotImplementedError, match="has no backward"):
            out.sum().backward()


@pytest.mark.parametrize("f", [attention, varlen_attention])
def test_compiled_autograd(f: Any) -> None:
    qkv = [x.requires_grad_() for x in rand(3, 1, 5, 2, 8)]
    want = torch.autograd.grad(loss(f, *qkv), qkv)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss(f, *qkv).backward()
    for x, gradient in zip(qkv, want, strict=True):
        assert torch.equal(x.grad, gradient)


# Public functions with dense arguments (batch 2, 3 rows, 4 and 2 heads of 16), and their FLOPs.
META: dict[str, tuple[Callable[..., Any], int]] = {
    "flash_attn_func": (lambda q, k, cu: fa3_ops.flash_attn_func(q, k, k), 2),
    "qkvpacked": (
        lambda q, k, cu: fa3_ops.flash_attn_qkvpacked_func(torch.stack((q, q, q), 2)),
        2,
    ),
    "varlen": (
        lambda q, k, cu: fa3_ops.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, k)), cu, cu, 3, 3
        ),
        2,
    ),
    "with_kvcache": (lambda q, k, cu: fa3_ops.flash_attn_with_kvcache(q, k, k), 2),
    "with_kvcache, int": (
        lambda q, k, cu: fa3_ops.flash_attn_with_kvcache(q, k, k.clone(), cache_seqlens=2),
        2,
    ),
    "append": (
        lambda q, k, cu: fa3_ops.flash_attn_with_kvcache(
            q[:, :1], k, k.clone(), k[:, :1], k[:, :1], cache_seqlens=cu[1:]
        ),
        2,
    ),
    "v2": (lambda q, k, cu: fa3_ops.v2.flash_attn_func(q, k, k), 2),
    "v2 varlen": (
        lambda q, k, cu: fa3_ops.v2.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, k)), cu, cu, 3, 3
        ),
        2,
    ),
    "v2 with_kvcache": (lambda q, k, cu: fa3_ops.v2.flash_attn_with_kvcache(q, k, k), 2),
    "v4": (lambda q, k, cu: fa3_ops.v4.flash_attn_func(q, k, k)[0], 2),
    "v4 varlen": (
        lambda q, k, cu: fa3_ops.v4.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, k)), cu_seqlens_q=cu, cu_seqlens_k=cu
        )[0],
        2,
    ),
}


class TestMeta:
    @pytest.mark.parametrize("name", META)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_functions(self, name: str, dtype: torch.dtype) -> None:
        f, batch = META[name]
        inputs = (rand(2, 3, 4, 16, dtype=dtype), rand(2, 3, 2, 16, dtype=dtype), ints(0, 1, 2))
        with FlopCounterMode(display=False) as flops:
            out = f(*(x.to("meta") for x in inputs))
        assert out.is_meta
        want = f(*inputs)
        assert (out.shape, out.dtype, out.stride()) == (want.shape, want.dtype, want.stride())
        # "varlen" without values is counted by its longest sequence, v4's by all rows of q
        rows, keys = out.shape[-3] // (batch if out.dim() == 3 else 1), 3
        if name == "v4 varlen":
            rows, keys = 6, 6
        assert flops.get_total_flops() == 4 * batch * rows * keys * 4 * 16

    def test_combine_and_metadata(self) -> None:
        partials = torch.empty(3, 2, 5, 4, 16, device="meta")
        out, lse = fa3_ops.flash_attn_combine(partials, partials[..., 0])
        assert out.shape == (2, 5, 4, 16)
        assert lse.shape == (2, 5, 4)
        seqlens = torch.empty(2, dtype=torch.int32, device="meta")
        assert fa3_ops.get_scheduler_metadata(2, 1, 64, 4, 2, 16, seqlens).is_meta

    def test_backward(self) -> None:
        qkv = [x.to("meta").requires_grad_() for x in rand(3, 2, 5, 4, 16)]
        with FlopCounterMode(display=False) as flops:
            fa3_ops.flash_attn_func(*qkv).sum().backward()
        assert flops.get_total_flops() == (4 + 10) * 2 * 5 * 5 * 4 * 16
        assert qkv[0].grad.shape == qkv[0].shape
