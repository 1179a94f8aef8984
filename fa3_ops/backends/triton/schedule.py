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
    heads: int  # of each token of a tile, a power of 2
    tiles: int  # of each sequence and KV head
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


def fewest_tiles(tokens: int, group: int, block_m: int) -> tuple[int, int]:
    """(how many tiles have all rows of a sequence and KV head, of how many heads each): a power of
    2 that may be more than there are."""
    heads = 1
    found = []
    while heads <= block_m and heads < 2 * group:
        found.append((-(-tokens * heads // block_m) * -(-group // heads), -heads))
        heads *= 2
    tiles, heads = min(found)
    return tiles, -heads


def shape_of(dtype: torch.dtype, headdim: int, headdim_v: int, few: bool) -> tuple[int, int]:
    """(rows of a tile, warps)."""
    width = max(headdim, headdim_v)
    if dtype == torch.float32:  # its sums are of floats: one tile for all calls
        return (32, 4) if width <= 128 else (16, 4)
    if few:
        return 16, 4
    if width > 256:
        return 32, 8
    return 64, 4 if headdim_v <= 128 else 8


def schedule(
    dtype: torch.dtype,
    dims: tuple[int, int],
    tokens: int,
    group: int,
    pairs: int,
    num_chunks: int,
    numbers: int,
    processors: int,
    most_rows: int,
) -> Schedule:
    """For `tokens` rows of q in each of so many pairs of sequence and KV head, in tiles of at most
    most_rows. Chunks are work items where there are too few tiles for the processors, and room for
    a partial result of `numbers` each."""
    few = tokens * group <= 16
    block_m, num_warps = shape_of(dtype, *dims, few)
    block_m = min(block_m, most_rows)
    tiles, heads = fewest_tiles(tokens, group, block_m)
    enough = 15 * processors // 8 if few else processors
    split = num_chunks > 1 and tiles * pairs < enough
    split = split and num_chunks * numbers <= MOST_PARTIAL_NUMBERS
    items = tiles * pairs * (num_chunks if split else 1)
    num_stages = 2
    if few and max(dims) <= 128 and dtype != torch.float32:
        # Many programs hide each other's waiting; few have to load further ahead.
        num_warps, num_stages = (2, 2) if items > 2 * processors else (4, 3)
    return Schedule(block_m, heads, tiles, num_warps, num_stages, split)
