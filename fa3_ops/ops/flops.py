"""Formulas for torch.utils.flop_counter.FlopCounterMode, which counts, as for PyTorch's own
attention, every product of the rectangle seqlen_q x seqlen_k whatever the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fa3_ops.ops.schema import COMMON_NAMES, bind

ops = torch.ops.fa3npu


def _lengths(a: dict[str, Any], side: str, longest: int, batch: int) -> list[int]:
    """Rows of each sequence; where lengths cannot be read, the longest for all."""
    seqused, cu_seqlens = a.get(f"seqused_{side}"), a.get(f"cu_seqlens_{side}")
    lengths: Tensor | None = (
        cu_seqlens.diff() if seqused is None and cu_seqlens is not None else seqused
    )
    if lengths is None or isinstance(lengths, FakeTensor) or lengths.is_meta:
        return [longest] * batch
    return list(lengths.tolist())


def _pairs(a: dict[str, Any]) -> int:
    """Of a row of q and a key, in all sequences."""
    q, k, cu_seqlens_q, page_table = a["q"], a["k"], a.get("cu_seqlens_q"), a.get("page_table")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    longest_q = q.shape[1] if cu_seqlens_q is None else a["max_seqlen_q"] or q.shape[0]
    if a.get("cu_seqlens_k") is not None:
        longest_k = a["max_seqlen_k"] or k.shape[0]
    else:
        longest_k = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    rows, keys = _lengths(a, "q", longest_q, batch), _lengths(a, "k", longest_k, batch)
    return sum(x * y for x, y in zip(rows, keys, strict=True))


def _forward(a: dict[str, Any]) -> int:
    q, v, qv = a["q"], a["v"], a["qv"]
    widths = q.shape[-1] + v.shape[-1] + (0 if qv is None else qv.shape[-1])
    return 2 * _pairs(a) * int(q.shape[-2] * widths)


def _backward(a: dict[str, Any]) -> int:
    q, v = a["q"], a["v"]
    # scores, dq and dk over headdim; dprobabilities and dv over headdim_v
    return 2 * _pairs(a) * int(q.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1]))


def _linear(a: dict[str, Any]) -> int:
    return 2 * int(a["x"].numel()) * int(a["weight"].shape[0])


def _count(packet: Any, formula: Callable[[dict[str, Any]], int]) -> None:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        a = bind(packet.default, args, kwargs)
        return formula({COMMON_NAMES.get(name, name): x for name, x in a.items()})

    register_flop_formula(packet, get_raw=True)(flops)


def register() -> None:
    _count(ops.flash_attn_func, _forward)
    _count(ops.flash_attn_varlen_func, _forward)
    _count(ops.flash_attn_kvcache, _forward)
    _count(ops.linear, _linear)
    _count(ops.flash_attn_func_backward, _backward)
    _count(ops.flash_attn_varlen_func_backward, _backward)
