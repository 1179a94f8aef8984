"""Any argument of any public function, replaced by what it cannot be: an error names it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sample_inputs import appending, cached, dense, ints, rand, rotary, varlen
from torch import Tensor

import fa3_ops
from fa3_ops import v2, v4

HUGE = 2**70
WINDOW = typing.get_type_hints(fa3_ops.flash_attn_func)["window_size"]
# By what they are: nothing of these is an argument of another kind.
WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "int": lambda: 3,
    "float": lambda: 2.5,
    "huge": lambda: HUGE,
    "str": lambda: "12",
    "list": lambda: [1, 2],
    "list of floats": lambda: [1.5, 2.0],
    "ndarray": lambda: np.array([1, 2]),
    "int64": lambda: torch.tensor([1, 2]),
    "float tensor": lambda: torch.tensor([1.0, 2.0]),
    "meta": lambda: torch.empty(2, dtype=torch.int32, device="meta"),
}


def allowed(value: Any, name: str, hint: Any, call: dict[str, Any]) -> bool:
    """Whether the function may accept the value."""
    kinds = typing.get_args(hint) or (hint,)
    if value is None:
        return type(None) in kinds or bool in kinds or hint is object
    if isinstance(value, Tensor):
        if value.is_meta:  # the only tensor of the call
            return name in call and sum(isinstance(x, Tensor) for x in call.values()) == 1
        if name.endswith("_descale") or hint is object:  # not read
            return True
        return hint == WINDOW and not value.is_floating_point()
    if hint == WINDOW:
        return isinstance(value, np.ndarray) or value == [1, 2]
    if bool in kinds or float in kinds:
        return isinstance(value, int | float)
    return int in kinds and type(value) is int and value != HUGE


def append_call() -> dict[str, Any]:
    cos, sin = rotary(8, 16)
    return appending(
        k_cache=rand(6, 4, 2, 16),
        v_cache=rand(6, 4, 2, 16),
        cache_batch_idx=ints(1, 0),
        cache_leftpad=ints(1, 0),
        page_table=ints(0, 3, 5, 1).view(2, 2),
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_seqlens=ints(0, 1),
        causal=True,
    )


def packed_call() -> dict[str, Any]:
    return appending(
        q=rand(6, 4, 16),
        k=rand(6, 2, 16),
        v=rand(6, 2, 16),
        cu_seqlens_q=ints(0, 3, 6),
        cu_seqlens_k_new=ints(0, 3, 6),
        max_seqlen_q=3,
    )


def paged_call() -> dict[str, Any]:
    pages = {"k": rand(6, 4, 2, 16), "v": rand(6, 4, 2, 16), "seqused_k": ints(5, 2)}
    return varlen(**pages, page_table=ints(0, 3, 5, 1).view(2, 2), cu_seqlens_k=None)


def packed_with_lengths() -> dict[str, Any]:
    return varlen(cu_seqlens_k=None, seqused_k=ints(5, 4), max_seqlen_k=None)


def packed_cache() -> dict[str, Any]:
    return cached(k_cache=rand(9, 2, 16), v_cache=rand(9, 2, 16), cache_seqlens=ints(5, 4))


def partial_results() -> dict[str, Any]:
    return {"out_partial": rand(3, 2, 5, 4, 16), "lse_partial": rand(3, 2, 5, 4)}


def metadata() -> dict[str, Any]:
    sizes = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 8, "num_heads_q": 4}
    return sizes | {"num_heads_kv": 2, "headdim": 16, "cache_seqlens": ints(5, 2)}


def metadata_v4() -> dict[str, Any]:
    sizes = {"max_seqlen_q": 1, "max_seqlen_k": 8, "nheads": 4, "nheads_kv": 2, "headdim": 16}
    return sizes | {"num_splits": 1, "seqused_k": ints(5, 2)}


def paged_v2() -> dict[str, Any]:
    pages = {"k": rand(6, 4, 2, 16), "v": rand(6, 4, 2, 16)}
    return varlen(**pages, cu_seqlens_k=ints(0, 5, 7), block_table=ints(0, 3, 5, 1).view(2, 2))


def qkv_packed() -> dict[str, Any]:
    return {"qkv": rand(7, 3, 4, 16), "cu_seqlens": ints(0, 3, 7), "max_seqlen": 4}


def kv_packed() -> dict[str, Any]:
    call = varlen(kv=rand(9, 2, 2, 16))
    return {name: x for name, x in call.items() if name not in ("k", "v")}


CALLS: dict[Any, list[Callable[[], dict[str, Any]]]] = {
    fa3_ops.flash_attn_func: [dense],
    fa3_ops.flash_attn_varlen_func: [varlen, paged_call, packed_with_lengths],
    fa3_ops.flash_attn_qkvpacked_func: [
        lambda: {"qkv": rand(2, 5, 3, 4, 16)},
        lambda: {"qkv": rand(2, 5, 8, 16), "num_heads_q": 4},
    ],
    fa3_ops.flash_attn_with_kvcache: [cached, append_call, packed_call, packed_cache],
    fa3_ops.flash_attn_combine: [partial_results],
    fa3_ops.get_scheduler_metadata: [metadata],
    v2.flash_attn_func: [dense],
    v2.flash_attn_qkvpacked_func: [lambda: {"qkv": rand(2, 5, 3, 4, 16)}],
    v2.flash_attn_kvpacked_func: [lambda: {"q": rand(2, 3, 4, 16), "kv": rand(2, 5, 2, 2, 16)}],
    v2.flash_attn_varlen_func: [varlen, paged_v2],
    v2.flash_attn_varlen_qkvpacked_func: [qkv_packed],
    v2.flash_attn_varlen_kvpacked_func: [kv_packed],
    v2.flash_attn_with_kvcache: [cached, lambda: appending(causal=True)],
    v4.flash_attn_func: [dense],
    v4.flash_attn_varlen_func: [varlen, paged_call, packed_with_lengths],
    v4.flash_attn_combine: [partial_results],
    v4.get_scheduler_metadata: [metadata_v4],
}


def every_argument() -> Iterator[Any]:
    for function, calls in CALLS.items():
        where = function.__module__.removeprefix("fa3_ops.")
        for i, call in enumerate(calls):
            for name in inspect.signature(function).parameters:
                yield pytest.param(
                    function, call, name, id=f"{where}.{function.__name__}-{i}-{name}"
                )


def test_every_public_function_is_here() -> None:
    public = {
        f
        for module in (fa3_ops, v2, v4)
        for name, f in vars(module).items()
        if name.startswith(("flash_attn", "get_scheduler_metadata")) and callable(f)
    }
    assert public == set(CALLS)


@pytest.mark.parametrize(("function", "make", "name"), list(every_argument()))
def test_a_wrong_argument_is_named(function: Any, make: Any, name: str) -> None:
    hint = typing.get_type_hints(function)[name]
    for kind, wrong in WRONG.items():
        value, call = wrong(), make()
        before = {n: x.clone() for n, x in call.items() if n.endswith("_cache")}
        allows = allowed(value, name, hint, call)
        text = refusal(function, call | {name: value})
        if text is None:
            assert allows, f"{kind}: accepted"
            continue
        names = "|".join({*call, name}) if allows else name  # what is left out may be missed
        assert re.search(rf"\b({names})\b", text), f"{kind}: {text}"
        for n, x in before.items():
            assert torch.equal(call[n], x), f"{kind}: {n} was written"


def refusal(function: Any, call: dict[str, Any]) -> str | None:
    try:
        function(**call)
    except (ValueError, TypeError) as error:
        return str(error)
    return None
