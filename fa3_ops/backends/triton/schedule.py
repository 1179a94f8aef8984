"""How attention is cut into tiles, which decides its bits, and into work items, which does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 1024  # keys of a partial result; a multiple of every block
MOST_PARTIAL_NUMBERS = 2**27  # 512 MB


@dataclass(frozen=True)
class Tile:
    """What the bits of a row may depend on: one for all calls of a dtype and head dimensions."""

    block_m: int  # rows
    block_n: int  # keys
    num_warps: int


@dataclass(frozen=True)
class Schedule:
    """How the tiles of a call are worked off."""

    split: bool  # every chunk of keys is a work item of its own, to be merged afterwards
    num_stages: int


def power_of_two(n: int) -> int:
    """The smallest from n on that a product takes, 16 or more."""
    return max(16, 1 << (n - 1).bit_length())


def parts_of(headdim: int) -> tuple[int, int]:
    """A head dimension as a sum of two powers of 2, of which the second may be 0 or too wide."""
    first = 1 << (headdim.bit_length() - 1)
    if headdim < 16 or power_of_two(headdim) == headdim:
        return power_of_two(headdim), 0
    rest = power_of_two(headdim - first)
    return (2 * first, 0) if rest == first else (first, rest)


def tile_of(dtype: torch.dtype, headdim: int, headdim_v: int) -> Tile:
    width = max(headdim, headdim_v)
    if dtype == torch.float32:
        return Tile(32, 32, 4) if width <= 128 else Tile(16, 16, 4)
    if width <= 128:
        return Tile(64, 64, 4)
    return Tile(64, 64, 8) if width <= 256 else Tile(32, 32, 8)


def schedule(
    tile: Tile, tiles: int, num_chunks: int, processors: int, decodes: bool, numbers: int
) -> Schedule:
    """Chunks are work items where there are too few tiles for the processors of the device, and
    room for the partial results, each of `numbers`."""
    enough = 2 * processors if decodes else processors
    split = num_chunks > 1 and tiles < enough and num_chunks * numbers <= MOST_PARTIAL_NUMBERS
    return Schedule(split, num_stages=2 if tile.num_warps == 8 else 3)
