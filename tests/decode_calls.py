"""Decode calls over pages that differ in what decides on kernels, or in that alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

B, NHEADS, NHEADS_K, HEADDIM, PAGE, PAGES = 2, 8, 2, 64, 16, 8
Call = dict[str, Any]


def rand(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def decode(new: int = 0, rotary: bool = False, **more: Any) -> Call:
    """Over pages; `new` keys are appended."""
    table = torch.randperm(B * PAGES).int().view(B, PAGES)
    k_cache, v_cache = (rand(B * PAGES, PAGE, NHEADS_K, HEADDIM) for _ in range(2))
    call: Call = {"q": rand(B, 1, NHEADS, HEADDIM), "k_cache": k_cache, "v_cache": v_cache}
    call["cache_seqlens"] = torch.randint(1, PAGE * PAGES - 8, (B,), dtype=torch.int32)
    call |= {"page_table": table, "causal": True}
    if new:
        call["k"], call["v"] = (rand(B, new, NHEADS_K, HEADDIM) for _ in range(2))
    if rotary:
        call["rotary_cos"], call["rotary_sin"] = rand(2, PAGE * PAGES, HEADDIM // 2)
    return call | more


def kinds() -> Iterator[Call]:
    """Pairs of neighbours differ in one thing that decides on a kernel or its arguments."""
    for new, rotary in ((0, False), (1, False), (1, True), (2, True)):
        yield decode(new, rotary)
    yield decode(1, True, rotary_seqlens=torch.tensor([3, 5], dtype=torch.int32))
    yield decode(1, True, cache_start=torch.tensor([3, 5], dtype=torch.int32))
    yield decode(softcap=1.0)
    yield decode(softcap=2)
    yield decode(window_size=(9, 0))
    yield decode(sinks=torch.randn(NHEADS))
    yield decode(alibi_slopes=torch.rand(NHEADS))
    yield decode(softmax_scale=0.5)
    yield decode(cache_batch_idx=torch.tensor([1, 0], dtype=torch.int32))
    caches = {x: rand(B * PAGES, PAGE, NHEADS_K, HEADDIM) for x in ("k_cache", "v_cache")}
    for dtype in (torch.float8_e4m3fn, torch.int8):
        narrow = {name: x.to(dtype) for name, x in caches.items()}
        descales = {"k_descale": torch.rand(B, NHEADS_K) + 0.5, "v_descale": torch.ones(1)}
        yield decode(1, **narrow, **descales)
        yield decode(1, **narrow)
    dense = {x: rand(B, 128, NHEADS_K, HEADDIM) for x in ("k_cache", "v_cache")}
    yield decode(q=rand(B, 70, NHEADS, HEADDIM), page_table=None, **dense)
    packed = torch.tensor([0, 1, 3], dtype=torch.int32)
    yield decode(q=rand(3, NHEADS, HEADDIM), cu_seqlens_q=packed, max_seqlen_q=2)
    ragged = {"k": rand(3, NHEADS_K, HEADDIM), "v": rand(3, NHEADS_K, HEADDIM)}
    yield decode(**ragged, cu_seqlens_k_new=packed)


def moved(x: Tensor, elements: int) -> Tensor:
    """The same in memory that begins so many elements behind a place that is aligned."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    memory = x.new_empty(size + elements)
    return memory.as_strided(x.shape, x.stride(), elements).copy_(x)


def changed(call: Call) -> Call:
    """The same with other numbers in its tensors, and longer sequences."""
    others = {
        name: torch.randn_like(x.float()).to(x.dtype)
        for name, x in call.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return call | others | {"cache_seqlens": call["cache_seqlens"] + 1}


def misaligned(call: Call) -> Iterator[Call]:
    """Each of its tensors in turn."""
    for name, x in call.items():
        if isinstance(x, Tensor):
            yield call | {name: moved(x, 1)}
