"""Calls that need no recording: a dozen features, small, and the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.testing.recordings import FunctionCall, largest_error


def built_in_calls(dtype: torch.dtype) -> list[FunctionCall]:
    """A dozen features, small."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(to)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    dense = {"q": rand(2, 9, 4, 64), "k": rand(2, 40, 2, 64), "v": rand(2, 40, 2, 64)}
    packed = {
        "q": rand(12, 4, 64),
        "k": rand(45, 2, 64),
        "v": rand(45, 2, 64),
        "cu_seqlens_q": ints(0, 5, 5, 12),
        "cu_seqlens_k": ints(0, 5, 20, 45),
        "max_seqlen_q": 7,
        "max_seqlen_k": 25,
    }
    cache = {"q": rand(2, 3, 4, 64), "k_cache": rand(2, 50, 2, 64), "v_cache": rand(2, 50, 2, 64)}
    cache |= {"cache_seqlens": ints(40, 17)}
    new = {"k": rand(2, 3, 2, 64), "v": rand(2, 3, 2, 64)}
    paged = cache | {
        "k_cache": rand(8, 16, 2, 64),
        "v_cache": rand(8, 16, 2, 64),
        "page_table": ints(3, 7, 1, 0, 4, 2).view(2, 3),
    }
    angles = torch.arange(64)[:, None] * 0.1 ** torch.arange(0, 1, 1 / 16)
    rotary = {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    causal = {"causal": True}
    f8 = torch.float8_e4m3fn
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "dense, GQA": ("flash_attn_func", dense),
        "causal": ("flash_attn_func", dense | causal),
        "window": ("flash_attn_func", dense | {"window_size": (5, 0)}),
        "softcap": ("flash_attn_func", dense | causal | {"softcap": 3.0}),
        "sinks": ("flash_attn_func", dense | causal | {"sinks": rand(4, to=torch.float32)}),
        "ALiBi": ("flash_attn_func", dense | causal | {"alibi_slopes": torch.rand(4)}),
        "qv": ("flash_attn_func", dense | causal | {"qv": rand(2, 9, 4, 64)}),
        "FP8": ("flash_attn_func", {k: x.to(f8) for k, x in dense.items()} | causal),
        "packed": ("flash_attn_varlen_func", packed | causal),
        "cache": ("flash_attn_with_kvcache", cache | causal),
        "left padding": ("flash_attn_with_kvcache", cache | {"cache_leftpad": ints(3, 17)}),
        "batch index": ("flash_attn_with_kvcache", cache | {"cache_batch_idx": ints(1, 0)}),
        "pages, append, rotary": ("flash_attn_with_kvcache", paged | new | rotary | causal),
    }
    return [
        FunctionCall(name, function, arguments) for name, (function, arguments) in calls.items()
    ]


def gradients(device: str, dtype: torch.dtype) -> str:
    """dq, dk, dv next to autograd through the reference."""
    call = built_in_calls(dtype)[1]
    inputs = {k: x for k, x in call.arguments.items() if k != "causal"}
    got = {k: x.to(device, copy=True).requires_grad_() for k, x in inputs.items()}
    want = {k: x.to(torch.float64, copy=True).requires_grad_() for k, x in inputs.items()}
    out = fa3_ops.flash_attn_func(**got, causal=True)
    assert isinstance(out, Tensor)
    wanted, _ = reference.batched(**want, causal=True)
    dout = torch.ones_like(out)
    out.backward(dout)
    wanted.backward(torch.ones_like(wanted))
    worst = 0.0
    for name in ("q", "k", "v"):
        ours, theirs = got[name].grad, want[name].grad
        assert ours is not None
        assert theirs is not None
        worst = max(worst, largest_error(ours, theirs) / max(float(theirs.abs().max()), 1.0))
    if worst > 2e-2:
        raise ValueError(f"gradients err by {worst:.1e} of the largest one, tolerated 2e-2")
    with torch.no_grad():
        served = fa3_ops.explain(
            torch.ops.fa3npu.flash_attn_func_backward,
            *(dout, got["q"], got["k"], got["v"], out),
            torch.zeros(2, 4, 9, device=device),
        ).backend
    return f"right (largest relative error {worst:.1e}), served by {served}"
