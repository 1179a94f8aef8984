"""The short way to a kernel: taken only where nobody would see the difference."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import appending, cached, dense, ints, rand, varlen
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fa3_ops
from fa3_ops.ops import checks, direct
from fa3_ops.ops.schema import signature

ops = torch.ops.fa3npu


def decode(**changes: Any) -> dict[str, Any]:
    return cached(1, causal=True) | changes


def append(**changes: Any) -> dict[str, Any]:
    return appending(1, causal=True) | changes


def paged_varlen() -> dict[str, Any]:
    cache = {"k": rand(4, 4, 2, 16), "v": rand(4, 4, 2, 16), "seqused_k": ints(5, 2)}
    pages = {"block_table": ints(0, 3, 2, 1).view(2, 2), "cu_seqlens_k": None}
    return varlen(**cache, **pages)


# A function, its inputs, the operator that it calls.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]], str]] = {
    "decode": (fa3_ops.flash_attn_with_kvcache, decode, "flash_attn_with_kvcache"),
    "out": (
        fa3_ops.flash_attn_with_kvcache,
        lambda: decode(out=torch.empty(2, 1, 4, 16)),
        "flash_attn_with_kvcache.out",
    ),
    "append": (fa3_ops.flash_attn_with_kvcache, append, "flash_attn_with_kvcache"),
    "dense": (fa3_ops.flash_attn_func, dense, "flash_attn_func"),
    "varlen": (fa3_ops.flash_attn_varlen_func, varlen, "flash_attn_varlen_func"),
    "paged varlen": (fa3_ops.flash_attn_varlen_func, paged_varlen, "flash_attn_kvcache"),
}
every_call = pytest.mark.parametrize(("function", "inputs", "op"), CALLS.values(), ids=CALLS.keys())


# flash_attn_func's arguments after q, k and v.
DEFAULTS = (None, False, *(None,) * 4, (-1, -1), 0, 0.0, 1, None, False, 0, None, None)


class Subclass(Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    """Lists our operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "fa3npu" in str(function):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "fa3npu":
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call inside took the short way."""
    taken: list[bool] = []
    ask = direct.plain

    def spy(*arguments: Any) -> Any:
        found = ask(*arguments)
        taken.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(direct, "plain", spy)
        yield taken


@every_call
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_plain_calls_take_it(
    function: Any, inputs: Any, op: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ways(monkeypatch) as taken, mode():
        function(**inputs())
        function(**inputs(), softcap=1, softmax_scale=0.25, window_size=[3, 0], num_splits=2)
        call = inputs()
        function(**call | {"q": torch.nn.Parameter(call["q"], requires_grad=False)})
    assert taken == [True] * 3


def test_gradients_that_nobody_records_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with ways(monkeypatch) as taken, torch.no_grad():
        out = fa3_ops.flash_attn_func(**dense(q=rand(2, 3, 4, 16, grad=True)))
    assert taken == [True]
    assert isinstance(out, Tensor)
    assert not out.requires_grad


@every_call
@pytest.mark.parametrize(
    "context",
    [
        FunctionMode,
        DispatchMode,
        partial(FakeTensorMode, allow_non_fake_inputs=True),
        partial(torch.autocast, "cpu", torch.bfloat16),
    ],
    ids=["function mode", "dispatch mode", "fake", "autocast"],
)
def test_not_where_a_mode_watches(
    function: Any, inputs: Any, op: str, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = inputs()
    if "autocast" in str(context):  # which casts neither a cache nor out
        kept = ("k_cache", "v_cache", "out")
        call = {name: x.bfloat16() if name in kept else x for name, x in call.items()}
    with ways(monkeypatch) as taken, context():
        function(**call)
    # Inside an operator neither torch functions are watched nor is autocast on.
    inside = context is FunctionMode or "autocast" in str(context)
    assert taken == ([False, inside] if op == "flash_attn_with_kvcache" else [False])


def refused_jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(f, (x,), (x,))


@pytest.mark.parametrize(
    "trace",
    [
        lambda f, x: make_fx(f)(x),
        lambda f, x: make_fx(f, pre_dispatch=True)(x),
        lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
        lambda f, x: torch.jit.trace(f, x, check_trace=False),
        lambda f, x: torch.func.grad(lambda y: (f(y.detach()) + y).sum())(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.functionalize(f)(x),
        refused_jvp,
    ],
    ids=[
        "make_fx",
        "pre_dispatch",
        "symbolic",
        "jit.trace",
        "grad",
        "vmap",
        "functionalize",
        "jvp",
    ],
)
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*", "ignore:.*batching rule.*"
)
def test_not_where_something_traces_or_transforms(
    trace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def f(x: Tensor) -> Tensor:
        out = fa3_ops.flash_attn_func(x, x, x)
        assert isinstance(out, Tensor)
        return out

    with ways(monkeypatch) as taken:
        trace(f, rand(2, 3, 4, 16))
    assert taken
    assert not any(taken)


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"q": rand(2, 1, 4, 16).as_subclass(Subclass)},
        lambda: {"cache_seqlens": ints(5, 2).as_subclass(Subclass)},
        lambda: {"q": rand(2, 1, 4, 16, grad=True)},
        lambda: {"sinks": torch.nn.Parameter(rand(4))},
    ],
    ids=["subclass", "subclass of lengths", "gradient", "gradient of sinks"],
)
def test_not_with_such_an_argument(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ways(monkeypatch) as taken:
        fa3_ops.flash_attn_with_kvcache(**decode(**change()))
    assert taken == [False, False]  # here, and where the operator is taken apart


def test_fake_tensors_outside_their_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTensorMode()
    call = {n: fake.from_tensor(x) if isinstance(x, Tensor) else x for n, x in decode().items()}
    with ways(monkeypatch) as taken:
        out = fa3_ops.flash_attn_with_kvcache(**call)
    assert taken == [False, False]  # here, and where the operator is taken apart
    assert isinstance(out, Tensor)
    assert out.shape == (2, 1, 4, 16)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
def test_a_nested_cache_is_asked_for_no_strides() -> None:
    """What else is wrong is told."""
    nested = torch.nested.nested_tensor([rand(8, 2, 16), rand(8, 2, 16)])
    with pytest.raises(TypeError, match="q must have one of the dtypes"):
        fa3_ops.flash_attn_with_kvcache(**decode(q=rand(2, 1, 4, 16).int(), k_cache=nested))


@every_call
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_both_ways_give_the_same(function: Any, inputs: Any, op: str, mode: Any) -> None:
    torch.manual_seed(0)
    short = inputs()
    long = {name: x.clone() if isinstance(x, Tensor) else x for name, x in short.items()}
    lse = "return_softmax_lse" if "k_cache" in short else "return_attn_probs"
    with mode():
        got = function(**short, **{lse: True})
        with FunctionMode() as watching:
            want = function(**long, **{lse: True})
    assert watching.seen[0] == f"fa3npu.{op}"
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert g.is_inference() == w.is_inference()
    for name, x in long.items():
        if isinstance(x, Tensor):
            assert torch.equal(short[name], x), name
            assert short[name].is_inference() or short[name]._version == x._version


@pytest.mark.parametrize(
    ("mode", "grad_mode", "seen"),
    [
        (FunctionMode, nullcontext, ["fa3npu.flash_attn_with_kvcache"]),
        (DispatchMode, nullcontext, ["fa3npu.flash_attn_kvcache.default"]),
        (DispatchMode, torch.inference_mode, ["fa3npu.flash_attn_with_kvcache.default"]),
    ],
    ids=["function", "dispatch", "dispatch in inference mode"],
)
def test_modes_see_the_operators(
    mode: type[FunctionMode], grad_mode: Callable[[], AbstractContextManager[Any]], seen: list[str]
) -> None:
    with grad_mode(), mode() as by_function:
        fa3_ops.flash_attn_with_kvcache(**decode())
    with grad_mode(), mode() as by_operator:
        ops.flash_attn_with_kvcache(**decode())
    assert by_function.seen == by_operator.seen == seen


def test_a_subclass_sees_the_composite() -> None:
    seen = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    fa3_ops.flash_attn_with_kvcache(**decode(q=rand(2, 1, 4, 16).as_subclass(Watching)))
    assert "fa3npu.flash_attn_with_kvcache" in seen


def test_what_it_leaves_out() -> None:
    """Autograd's kernels, and the composite."""
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    autograd = torch._C.DispatchKey.AutogradOther  # stands for all of them
    assert direct.take(lambda: excluded(autograd), ())
    assert not excluded(autograd)

    def operators(function: Any, inputs: dict[str, Any]) -> set[str]:
        with torch.profiler.profile() as profile:
            function(**inputs)
        return {e.name.removeprefix("fa3npu::") for e in profile.events() if "fa3npu" in e.name}

    attend, appended = {"flash_attn_kvcache"}, {"kvcache_append_"}
    assert operators(fa3_ops.flash_attn_with_kvcache, decode()) == attend
    assert operators(fa3_ops.flash_attn_with_kvcache, append()) == attend | appended


def scatter(**changes: Any) -> dict[str, Any]:
    cache = {"k_cache": rand(4, 4, 2, 16), "v_cache": rand(4, 4, 2, 16)}
    return {
        "k": rand(3, 2, 16),
        "v": rand(3, 2, 16),
        **cache,
        "slot_mapping": ints(9, -1, 2),
    } | changes


def narrow_scatter() -> dict[str, Any]:
    cache = {name: rand(4, 4, 2, 16).to(torch.float8_e5m2) for name in ("k_cache", "v_cache")}
    return scatter(**cache, k_descale=rand(2).abs(), v_descale=rand(2).abs())


# Besides CALLS, those that write without attending, and one that needs only numbers.
CHECKED: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    **{name: call[:2] for name, call in CALLS.items()},
    "paged out": (
        fa3_ops.flash_attn_varlen_func,
        lambda: paged_varlen() | {"out": torch.empty(7, 4, 16)},
    ),
    "operator": (ops.flash_attn_with_kvcache, decode),
    "scatter": (fa3_ops.kvcache_scatter_, scatter),
    "narrow scatter": (fa3_ops.kvcache_scatter_, narrow_scatter),
    "linear": (fa3_ops.linear, lambda: {"x": rand(3, 4), "weight": rand(5, 4), "bias": rand(5)}),
}
NUMBERS = (None, True, 1, 2, -1, -5, 2**70, 0.5, float("nan"), float("inf"), "x")
WINDOWS = ((2, 0), (1,), (2**70, 0), (-(2**70), 0), None)


def other_tensors(x: Tensor) -> list[Tensor]:
    """What differs from x in one respect."""
    rows = x.unsqueeze(-1) if x.dim() < 2 else x
    return [
        *(x.to(dtype) for dtype in (torch.int32, torch.int64, torch.float16, torch.float64)),
        *(x.to(torch.float8_e5m2), x.to("meta")),
        torch.sparse_coo_tensor(size=x.shape, dtype=x.dtype),
        *(x[None], x[..., None], x[:0], x[..., :0], x[:-1], x[..., :-1], torch.tensor(1.0)),
        *(torch.cat([x, x]), torch.cat([x, x], -1), torch.cat([x] * 40, -1)),
        *((x + 1, x - 9) if x.dtype is torch.int32 else ()),
        *(torch._neg_view(x), rows.mT.contiguous().mT, x[:1].expand(x.shape)),
        x.clone().as_subclass(Subclass),
    ]


SOME = (rand(2), rand(4), ints(1), ints(1, 1), ints(0, 1, 1), ints(0, 1, 1, 0).view(2, 2))


def faults(function: Any, given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument, each time as something else, most of which is wrong."""
    op = getattr(function, "default", None)
    names = signature(op).names if op else inspect.signature(function).parameters
    for name in names:
        x = given.get(name)
        tensors = SOME if x is None else other_tensors(x) if isinstance(x, Tensor) else ()
        for other in (*tensors, *NUMBERS, *WINDOWS):
            yield name, other


@pytest.mark.parametrize(("function", "inputs"), CHECKED.values(), ids=CHECKED.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_only_the_kernel_checks_is_refused_like_anything_else(
    function: Any, inputs: Any
) -> None:
    def outcome(call: dict[str, Any], mode: Any) -> Any:
        """The results or the error, and what became of the arguments."""
        call = {name: x.clone() if is_plain(x) else x for name, x in call.items()}
        before = {name: x.clone() for name, x in call.items() if is_plain(x)}
        try:
            with mode():
                results = function(**call)
            error = None
        except Exception as raised:
            text = re.sub(r"\.0\b", "", str(raised))  # an operator makes a float of an int
            results, error = None, (type(raised), text)
        after = [call[name] for name in before]
        assert not error or same(after, [*before.values()]), f"written before {error}"
        return results, error, after

    right = inputs()
    for name, other in faults(function, right):
        call = right | {name: other}
        assert same(outcome(call, nullcontext), outcome(call, DispatchMode)), (name, other)


@pytest.mark.parametrize("headdim", [0, 520])
def test_heads_that_only_the_kernel_of_a_scatter_sees(headdim: int) -> None:
    call = {n: rand(*x.shape[:-1], headdim) for n, x in scatter().items() if n != "slot_mapping"}
    with pytest.raises(ValueError, match=rf"headdim must be in \[1, 512\], got {headdim}"):
        fa3_ops.kvcache_scatter_(**scatter(**call))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_backend_that_was_asked_for_gets_what_was_checked(backend: str) -> None:
    for inputs in (decode, lambda: decode(out=torch.empty(2, 1, 4, 16))):
        with fa3_ops.use_backend(backend), pytest.raises(TypeError, match="k_cache must have dty"):
            fa3_ops.flash_attn_with_kvcache(**inputs() | {"k_cache": rand(2, 8, 2, 16).half()})
    cache = rand(4, 4, 2, 16).half()
    with fa3_ops.use_backend(backend), pytest.raises(TypeError, match="v_cache must have dtype"):
        fa3_ops.kvcache_scatter_(**scatter(v_cache=cache))


@pytest.mark.parametrize("name", [name for name in CHECKED if name != "append"])
def test_what_the_kernel_checks_is_checked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = CHECKED[name]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("is checked")

    for check in ("attention", "append", "scatter", "linear"):
        monkeypatch.setattr(checks, check, refuse)
    function(**inputs())
    if "flash_attn" in str(function):
        with pytest.raises(AssertionError, match="is checked"):
            function(**inputs(), sinks=rand(4))


def is_plain(x: object) -> bool:
    return type(x) is Tensor and x.layout is torch.strided and x.is_contiguous() and not x.is_neg()


def same(a: Any, b: Any) -> bool:
    """To the last bit."""
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, Tensor):
        return bool(a == b)
    if a.device.type == "meta":
        return a.shape == b.shape and a.dtype is b.dtype
    as_bytes = [x.contiguous().flatten().view(torch.uint8).tolist() for x in (a, b)]
    return a.dtype is b.dtype and a.shape == b.shape and as_bytes[0] == as_bytes[1]


def test_an_append_is_refused_before_it_writes() -> None:
    """An int that the schema cannot take is no other type."""
    call = append(attention_chunk=2**70)
    before = call["k_cache"].clone()
    with pytest.raises(ValueError, match=r"attention_chunk must be less than 2\*\*63, got 1180"):
        fa3_ops.flash_attn_with_kvcache(**call)
    assert torch.equal(call["k_cache"], before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_splits": 1.5}, "num_splits must be an int or None, got 1.5"),
        ({"softmax_scale": torch.ones(2)}, "softmax_scale must be a number or None, got Tensor"),
        ({"pack_gqa": "yes"}, "pack_gqa must be True or False or None, got 'yes'"),
    ],
)
@pytest.mark.parametrize("inputs", [decode, append])
def test_wrong_types_are_named(inputs: Any, change: Any, text: str) -> None:
    call = inputs()
    before = call["k_cache"].clone()
    with pytest.raises(TypeError, match=text):
        fa3_ops.flash_attn_with_kvcache(**call, **change)
    with pytest.raises(RuntimeError, match=r"fa3npu::flash_attn_with_kvcache\(\) Expected a value"):
        ops.flash_attn_with_kvcache(**call, **change)
    assert torch.equal(call["k_cache"], before)


@pytest.mark.parametrize(
    "name",
    [
        "DispatchKeySet",
        "_AutoDispatchBelowAutograd",
        "_dispatch_tls_local_include_set",
        "_is_any_autocast_enabled",
        "_is_torch_function_mode_enabled",
    ],
)
def test_a_pytorch_without_what_tells_a_plain_call_gets_it_the_ordinary_way(name: str) -> None:
    code = f"""
import torch
import fa3_ops
from fa3_ops.ops import direct
import importlib
q = torch.randn(1, 2, 2, 16)
want = fa3_ops.flash_attn_func(q, q, q)
arguments = (q, q, q, {", ".join(map(repr, DEFAULTS))})
op = torch.ops.fa3npu.flash_attn_func
assert direct.plain(op, arguments)
delattr(torch._C, {name!r})
importlib.reload(direct)
assert not direct.plain(op, arguments)
with torch.inference_mode():  # which needs nothing of it
    assert torch.equal(direct.call(op, bool, arguments)[0], want)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
