"""Keys and values of 8 bits, as the kernel of attention takes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fa3_ops.backends.call import Attention
from fa3_ops.backends.triton.device import has_descriptors
from fa3_ops.backends.triton.rows import FORMATS
from fa3_ops.backends.triton.schedule import parts_of, power_of_two


def format_of_pairs(call: Attention) -> int | None:
    """Of k and v, if they are loaded two numbers at a time (kernels/narrow.py): by a GPU that
    converts them so, from rows of whole pairs."""
    paired = (
        call.is_narrow
        and call.q.dtype != torch.float32
        and call.headdim % 2 == call.headdim_v % 2 == 0
        and has_descriptors(call.q.device)
    )
    return FORMATS[call.k.dtype] if paired else None


def is_bitwise(call: Attention) -> bool:
    """Not of keys of 8 bits that a GPU loads one by one, and so sums in an order of each tile."""
    by_tile = call.is_narrow and call.q.dtype != torch.float32 and call.q.device.type == "cuda"
    return not by_tile or format_of_pairs(call) is not None


def in_pairs(x: Tensor) -> Tensor:
    """x, of an even number of columns, as int16; a copy where its rows do not begin at 2 bytes."""
    if any(n % 2 for n in (*x.stride()[:-1], x.data_ptr())):
        x = x.clone(memory_format=torch.contiguous_format)
    elif x.storage_offset() % 2:  # of memory that begins at an odd byte: view() would refuse it
        x = from_dlpack(x.view(torch.int8))
    return x.view(torch.int16)


def widths(call: Attention, paired: bool) -> tuple[int, int, int]:
    """The parts of headdim that are multiplied one after the other, and the columns of a tile of
    out; half a part has no less columns than a product takes."""
    parts = (*parts_of(call.headdim), power_of_two(call.headdim_v))
    dim, dim_rest, dim_v = (max(n, 32) if paired and n else n for n in parts)
    return dim, dim_rest, dim_v
