"""Rows of heads and rotary tables, as the kernels that rotate and that write caches take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.triton.launch import unit_last_stride
from fa3_ops.backends.triton.schedule import power_of_two
from fa3_ops.ops import checks

PLAIN = 0  # as kernels/numbers.py has it, and so the others
FORMATS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2, torch.int8: 3}
MOST_ELEMENTS = 2048  # that a program has of the heads of a row at once


def elements(t: Tensor) -> Tensor:
    """FP8 as bytes."""
    return t.view(torch.uint8) if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else t


def ints(t: Tensor | None) -> Tensor | None:
    """Lengths, offsets or slots side by side."""
    return None if t is None else t.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of (batch entry or page, row, head)."""
    if x is None:
        return 0, 0, 0
    *batch, row, head, _ = x.stride()
    return batch[0] if batch else 0, row, head


def heads_at_once(nheads: int, width: int) -> int:
    return min(1 << (nheads - 1).bit_length(), max(MOST_ELEMENTS // power_of_two(width), 1))


def check_tables(x: Tensor, name: str, rotary_cos: Tensor, rotary_sin: Tensor) -> None:
    """Of which a position can be bounded by the last one."""
    checks.rotary(x, name, x, name, rotary_cos, rotary_sin)
    if rotary_cos.shape[0] == 0:
        raise ValueError(f"rotary_cos must reach a position, got shape {tuple(rotary_cos.shape)}")


def table(t: Tensor) -> Tensor:
    """rotary_cos or rotary_sin."""
    return unit_last_stride(t.float() if t.dtype == torch.float8_e4m3fn else t)


def rotation(dtype: torch.dtype, pairs: int, interleaved: bool) -> dict[str, Any]:
    """The constants of a rotation of rows of a dtype."""
    import triton.language as tl

    return {
        "PAIRS": pairs,
        "PAIRS_DIM": power_of_two(max(pairs, 1)),
        "INTERLEAVED": interleaved,
        "FORMAT": FORMATS.get(dtype, PLAIN),
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
