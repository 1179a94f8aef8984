"""Numbers that change between calls of one compiled function: every public function, traced whole
with its defaults and with new numbers, gives what eager gives.

PyTorch's cache of AOTAutograd takes a graph of an old number for the new one where the number is
also a factor of a tensor; its own scaled_dot_product_attention is hit. So q is scaled by it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fa3_ops
import fa3_ops.v2
import fa3_ops.v4

CU = ints(0, 3, 7)
Call = Callable[..., Any]


def lengths() -> tuple[Any, ...]:
    return CU, CU, 4, 4


# f(q, k, v, **numbers), of q (2, 5, 4, 16) and k, v (2, 5, 2, 16); packed ones take 7 rows of them.
FUNCTIONS: dict[str, Call] = {
    "flash_attn_func": lambda q, k, v, **n: fa3_ops.flash_attn_func(q, k, v, **n),
    "qkvpacked": lambda q, k, v, **n: fa3_ops.flash_attn_qkvpacked_func(
        torch.cat((q, k, v), 2), num_heads_q=4, **n
    ),
    "varlen": lambda q, k, v, **n: fa3_ops.flash_attn_varlen_func(
        *packed(q, k, v), *lengths(), **n
    ),
    "with_kvcache": lambda q, k, v, **n: fa3_ops.flash_attn_with_kvcache(q, k, v, **n),
    "append": lambda q, k, v, **n: fa3_ops.flash_attn_with_kvcache(
        q[:, :1], k.clone(), v.clone(), k[:, :1], v[:, :1], cache_seqlens=CU[:2], **n
    ),
    "v2": lambda q, k, v, **n: fa3_ops.v2.flash_attn_func(q, k, v, **n),
    "v2 varlen": lambda q, k, v, **n: fa3_ops.v2.flash_attn_varlen_func(
        *packed(q, k, v), *lengths(), **n
    ),
    "v2 with_kvcache": lambda q, k, v, **n: fa3_ops.v2.flash_attn_with_kvcache(q, k, v, **n),
    "v2 kvpacked": lambda q, k, v, **n: fa3_ops.v2.flash_attn_kvpacked_func(
        q, torch.stack((k, v), 2), **n
    ),
    "v4": lambda q, k, v, **n: fa3_ops.v4.flash_attn_func(q, k, v, **n)[0],
    "v4 varlen": lambda q, k, v, **n: fa3_ops.v4.flash_attn_varlen_func(
        *packed(q, k, v), cu_seqlens_q=CU, cu_seqlens_k=CU, **n
    )[0],
}
DYNAMIC = {"None": None, "True": True, "mark_dynamic": None}
BOTH = [lambda s: {"softcap": s + 0.5, "softmax_scale": s + 0.001}]
NUMBERS: dict[str, list[Call]] = {
    "aot_eager": [
        lambda s: {},
        lambda s: {"softmax_scale": s},
        lambda s: {"softcap": s, "causal": True},
        *BOTH,
    ],
    "inductor": BOTH,  # compiles for seconds
}


def packed(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.flatten(0, 1)[:7] for t in x)


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return rand(2, 5, 4, 16), rand(2, 5, 2, 16), rand(2, 5, 2, 16)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("backend", NUMBERS)
def test_every_function(name: str, dynamic: str, backend: str) -> None:
    f = FUNCTIONS[name]
    qkv = inputs()
    for numbers in NUMBERS[backend]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)

        def step(q: Tensor, k: Tensor, v: Tensor, s: float, numbers: Any = numbers) -> Tensor:
            out: Tensor = f(q * s, k, v, **numbers(s))
            return out

        if dynamic == "mark_dynamic":
            for x in qkv:
                torch._dynamo.maybe_mark_dynamic(x, 1)
        compiled = torch.compile(step, fullgraph=True, dynamic=DYNAMIC[dynamic], backend=counter)
        scales = (0.25, 0.5, 1.0)
        for s in scales:
            assert torch.equal(compiled(*qkv, s), step(*qkv, s)), s
        # A compilation for each number; the second is begun with a symbol, and once more without.
        assert counter.frame_count <= len(scales) + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_scheduler_metadata(backend: str) -> None:
    def f(n: Tensor, s: float) -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            2, 1, 64, 4, 2, 16, n, softcap=s, softmax_scale=s, has_softcap=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for s in (0.25, 0.5):
        assert torch.equal(compiled(ints(4, 9), s), f(ints(4, 9), s))
