"""linear by Triton: one kernel, in tiles for few, some and many rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Linear
from fa3_ops.backends.triton.device import missing, programs
from fa3_ops.backends.triton.launch import launch, unit_last_stride
from fa3_ops.ops import checks


@dataclass(frozen=True)
class Tile:
    """Decides on no bit, as long as all tiles of a dtype have one block_k and one part."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    part: int = 0  # products that are summed apart


FEW_ROWS = Tile(16, 32, 64, num_warps=4, num_stages=5)
SOME_ROWS = Tile(64, 64, 64, num_warps=4, num_stages=4)
MANY_ROWS = Tile(128, 128, 64, num_warps=8, num_stages=3)
FLOAT32 = Tile(64, 64, 32, num_warps=4, num_stages=2, part=128)
FEW, SOME = 16, 512  # rows at most
NEIGHBOURS = 8  # tiles of rows that are at work together


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return FLOAT32
    if rows <= FEW:
        return FEW_ROWS
    return SOME_ROWS if rows <= SOME else MANY_ROWS


class TritonLinear(Backend[Linear]):
    name = "triton"

    def __init__(self, tile_for: Callable[[int, torch.dtype], Tile] = tile_for) -> None:
        self.tile_for = tile_for  # as the device has room

    def not_supported_reasons(self, request: Linear, run: Run) -> list[str]:
        wide = ["dtype torch.float64"] if request.x.dtype == torch.float64 else []
        return missing() + wide

    def is_bitwise(self, request: Linear, run: Run) -> bool:
        return True

    def lower(self, request: Linear, run: Run) -> tuple[Tensor, Tensor]:
        """x as a matrix, and weight."""
        checks.linear(request.x, request.weight, request.bias)
        *batch, depth = request.x.shape
        rows = request.x.reshape(math.prod(batch), depth)
        return unit_last_stride(rows), unit_last_stride(request.weight)

    def launch(self, request: Linear, lowered: tuple[Tensor, Tensor], run: Run) -> Tensor:
        from fa3_ops.backends.triton.kernels.linear import linear

        x, weight = lowered
        (rows, depth), columns = x.shape, weight.shape[0]
        out = request.empty_results()
        bias = None if request.bias is None else request.bias.contiguous()
        tile = self.tile_for(rows, x.dtype)
        row_tiles, column_tiles = -(-rows // tile.block_m), -(-columns // tile.block_n)
        launch(
            linear,
            programs(row_tiles * column_tiles, x.device),
            *(x, weight, bias, out, rows, columns, depth, row_tiles, column_tiles),
            *(x.stride(0), weight.stride(0)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            PART=tile.part,
            EVEN=depth % tile.block_k == 0,
            NEIGHBOURS=NEIGHBOURS,
        )
        return out
