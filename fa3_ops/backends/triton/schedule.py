"""How attention is cut into blocks, which decides its bits, and worked off, which does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 512  # keys of a partial result; a multiple of every block
MOST_PARTIAL_NUMBERS = 2**27  # 512 MB


@dataclass(frozen=True)
class Schedule:
    """How a call is worked off, by programs of num_warps with num_stages of keys in flight."""

    block_m: int  # rows of a tile
    num_warps: int
    num_stages: int
    split: bool  # every chunk of keys is a work item of its own, to be merged afterwards


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


def block_n(dtype: torch.dtype, headdim: int, headdim_v: int) -> int:
    """Keys of a block, on which bits depend: one number for a dtype and head dimensions."""
    width = max(headdim, headdim_v)
    if dtype == torch.float32:
        return 32 if width <= 128 else 16
    return 64 if width <= 256 else 32


def schedule(
    dtype: torch.dtype,
    dims: tuple[int, int],
    rows: int,
    pairs: int,
    num_chunks: int,
    numbers: int,
    processors: int,
) -> Schedule:
    """For `rows` of each of so many pairs of sequence and KV head. Chunks are work items where
    there are too few tiles for the processors, and room for a partial result of `numbers` each."""
    headdim, headdim_v = dims
    width = max(headdim, headdim_v)
    few = rows <= 16
    if dtype == torch.float32:  # sums of floats: one tile for all
        block_m, num_warps = (32, 4) if width <= 128 else (16, 4)
    elif width > 256:
        block_m, num_warps = (16, 4) if few else (32, 8)
    else:
        block_m, num_warps = (16, 4) if few else (64, 4 if headdim_v <= 128 else 8)
    tiles = pairs * -(-rows // block_m)
    enough = 2 * processors if few else processors
    split = num_chunks > 1 and tiles < enough and num_chunks * numbers <= MOST_PARTIAL_NUMBERS
    items = tiles * (num_chunks if split else 1)
    if few and width <= 128 and dtype != torch.float32 and items > processors:
        num_warps = 2  # more programs at a time, each slower
    return Schedule(block_m, num_warps, 2, split)
