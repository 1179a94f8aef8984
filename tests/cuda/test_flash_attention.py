"""FlashAttention-3 and FlashAttention-4 themselves, as backends on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import moved
from hopper_calls import (
    BY_3,
    BY_BOTH,
    CAUSAL,
    F8,
    F16,
    FUNCTIONS,
    MADE,
    NAMES,
    expected,
    ints,
    rand,
)
from launches import launches
from torch import Tensor

import fa3_ops
from fa3_ops.backends.cuda import flash_attn_3, flash_attn_4
from fa3_ops.backends.cuda.flash_attention import Package

BF16 = torch.bfloat16
PACKAGES: dict[str, Callable[[], Package | str]] = {
    "flash_attn_3": flash_attn_3.package,
    "flash_attn_4": flash_attn_4.package,
}


@pytest.fixture(autouse=True)
def same_calls() -> None:
    torch.manual_seed(0)


def installed(name: str) -> Package:
    """Or the test is skipped: FlashAttention is no part of this project."""
    found = PACKAGES[name]()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def in_bfloat16(call: dict[str, Any]) -> dict[str, Any]:
    """Which every build has."""
    halves = {n: x.to(BF16) for n, x in call.items() if torch.is_tensor(x) and x.dtype == F16}
    return call | halves


@contextmanager
def served_by(name: str, kind: str, call: dict[str, Any]) -> Iterator[None]:
    """Skips what this build leaves out, and only that."""
    package = installed(name)
    with fa3_ops.use_backend(name):
        try:
            fa3_ops.explain(FUNCTIONS[kind], **call)
        except NotImplementedError as refusal:
            if package.can.name == "fa3_fwd":
                pytest.skip(str(refusal))
            raise
        with launches("cuda") as launched:
            yield
    assert launched[-1] == name


def assert_right(name: str, kind: str, call: dict[str, Any]) -> None:
    dtype, softcap = call["q"].dtype, call.get("softcap", 0.0)
    on_gpu = moved(call)
    with served_by(name, kind, on_gpu):
        out, lse = FUNCTIONS[kind](**on_gpu, return_softmax_lse=True)
    want, want_lse = expected(kind, call)
    assert out.dtype == (BF16 if dtype == F8 else dtype)
    # P is rounded to the inputs' dtype, and tanh is the hardware's.
    slack = 0.1 if dtype == F8 else 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double().cpu(), want, rtol=2**-6, atol=slack)
    lse_slack = 2e-2 if dtype == F8 else 1e-3 + 2e-3 * softcap
    torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=1e-4, atol=lse_slack)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BY_BOTH)
def test_by_both(name: str, case: str) -> None:
    kind, more = BY_BOTH[case]
    assert_right(name, kind, in_bfloat16(MADE[kind](**more)))


@pytest.mark.parametrize("case", BY_3)
def test_by_flash_attn_3(case: str) -> None:
    kind, more = BY_3[case]
    assert_right("flash_attn_3", kind, in_bfloat16(MADE[kind](**more)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("headdim", [64, 96, 128, 192, 256])
def test_many_blocks(name: str, headdim: int, group: int) -> None:
    call = {
        "q": rand(301, 2 * group, headdim, dtype=BF16),
        "k": rand(700, 2, headdim, dtype=BF16),
        "v": rand(700, 2, headdim, dtype=BF16),
        "cu_seqlens_q": ints(0, 1, 130, 301),
        "cu_seqlens_k": ints(0, 257, 300, 700),
        "max_seqlen_q": 171,
        "max_seqlen_k": 400,
        "causal": True,
    }
    assert_right(name, "packed", call)


def decode(batch: int, length: int, **more: Any) -> dict[str, Any]:
    cache = {n: rand(batch, length, 2, 128, dtype=BF16).cuda() for n in ("k_cache", "v_cache")}
    q = rand(batch, 1, 8, 128, dtype=BF16).cuda()
    lengths = torch.randint(length // 2, length - 8, (batch,), dtype=torch.int32).cuda()
    return {"q": q, **cache, "cache_seqlens": lengths, **more}


def test_one_split_gives_a_row_the_same_bits_in_any_batch() -> None:
    call = decode(8, 4096, num_splits=1)
    with served_by("flash_attn_3", "cache", call):
        together = fa3_ops.flash_attn_with_kvcache(**call)
        for b in range(8):
            one = {n: x[b : b + 1] if torch.is_tensor(x) else x for n, x in call.items()}
            assert torch.equal(fa3_ops.flash_attn_with_kvcache(**one)[0], together[b])


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_sees_lengths_grow(name: str) -> None:
    call = decode(4, 512, causal=True)
    with served_by(name, "cache", call):
        fa3_ops.flash_attn_with_kvcache(**call)  # FlashAttention-4 is compiled by now
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fa3_ops.flash_attn_with_kvcache(**call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fa3_ops.flash_attn_with_kvcache(**call)
        for _ in range(5):
            call["cache_seqlens"] += 1
            graph.replay()
            assert torch.equal(out, fa3_ops.flash_attn_with_kvcache(**call))


def gradients(name: str, kind: str, call: dict[str, Any], dout: Tensor) -> list[Tensor]:
    inputs = {n: call[n].detach().requires_grad_() for n in ("q", "k", "v")}
    with served_by(name, kind, call | inputs):
        out = FUNCTIONS[kind](**call | inputs)
        (out * dout).sum().backward()
    return [x.grad for x in inputs.values() if x.grad is not None]


GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", CAUSAL),
    "window, softcap": ("dense", {"window_size": (3, 1), "softcap": 3.0}),
    "sinks": ("dense", {"sinks": rand(4)}),
    "packed": ("packed", CAUSAL),
    "packed, used in part": (
        "packed",
        {"seqused_q": ints(2, 0, 5, 1), "seqused_k": ints(7, 0, 0, 3)},
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(name: str, case: str) -> None:
    if not installed(name).can.backward:
        pytest.skip(f"{installed(name).can.name} has no backward")
    kind, more = GRADIENTS[case]
    call = in_bfloat16(MADE[kind](**more, deterministic=True))
    dout = torch.randn(call["q"].shape)
    found, again = (gradients(name, kind, moved(call), dout.cuda().bfloat16()) for _ in range(2))
    inputs = {n: call[n].double().requires_grad_() for n in ("q", "k", "v")}
    plain = {n: x for n, x in call.items() if n != "deterministic"}
    out, _ = expected(kind, plain | inputs)
    (out * dout.bfloat16().double()).sum().backward()
    for got, same, x in zip(found, again, inputs.values(), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.double().cpu(), x.grad, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_device_counts(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    call = in_bfloat16(MADE["dense"]())
    other = moved(call, "cuda:1")
    before = torch.cuda.memory_allocated(0)
    with served_by(name, "dense", other):
        out = fa3_ops.flash_attn_func(**other)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.memory_allocated(0) == before
    want = expected("dense", call)[0]
    torch.testing.assert_close(out.double().cpu(), want, rtol=2**-6, atol=0.05)


def test_nothing_of_theirs_is_registered_by_python() -> None:
    installed("flash_attn_3")
    assert not {"flash_attn_interface", "fa3_fwd_interface"} & set(sys.modules)
