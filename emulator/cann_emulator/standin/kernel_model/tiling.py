"""The kernel's parameters, the tasks they imply, and the flash-decode cut.

A tiling is what the host computes for a launch, or what scheduler metadata holds: 2384 bytes, of
which the kernel believes every field.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KV_TILE = 512  # keys per tile, counted from position 0
Q_TILE = 128  # rows of q per task
BYTES = 2384
UNBOUNDED = 2**31 - 1

NO_MASK, CAUSAL, BAND = 0, 1, 2

# A core's part of the list of kv tiles; both ends name (batch, head block, first or last tile).
_CORE = [(f"{end}_{part}", "i4") for end in ("start", "end") for part in ("b", "n", "tile")]
_CORE += [("partial", "i4")]  # where its first partial result goes, in rows
# A row block whose kv is cut, to be merged from `pieces` partial results.
_CUT = [(name, "i4") for name in ("b", "head", "heads", "rows", "pieces", "partial")]
_FIELDS = [
    ("batch", "i4"),
    ("heads", "i4"),
    ("heads_k", "i4"),
    ("headdim", "i4"),
    ("headdim_v", "i4"),
    ("page_size", "i4"),
    ("pages_per_row", "i4"),
    ("max_q", "i4"),
    ("max_kv", "i4"),
    ("mask", "i4"),
    ("window_left", "i4"),
    ("window_right", "i4"),
    ("scale", "f4"),  # already divided by softcap
    ("softcap", "f4"),
    ("first_tasks", "i4"),
    ("tasks", "i4"),
    ("new", "i4"),  # appended rows per sequence
    ("capacity", "i4"),  # rows of the cache per sequence
    ("flash_decode", "i4"),
    ("cores_used", "i4"),
    ("cuts_used", "i4"),
    ("core", _CORE, (25,)),
    ("cut", _CUT, (25,)),
]
_PACKED = np.dtype(_FIELDS)
TILING = np.dtype([*_FIELDS, ("unused", "u1", (BYTES - _PACKED.itemsize,))])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def head_blocks(q_len: int, group: int) -> tuple[int, int]:
    """(heads per task, tasks per kv head)."""
    heads = Q_TILE // q_len // 2 * 2 if q_len else Q_TILE
    heads = max(min(heads, group), 1)
    return heads, ceil_div(group, heads)


def tasks(q_len: int, group: int, heads_k: int) -> int:
    return head_blocks(q_len, group)[1] * heads_k * ceil_div(q_len, Q_TILE)


def mask_of(causal: bool, left: int, right: int, bound: int) -> tuple[int, int, int]:
    """(mask, left, right); a side that reaches over all `bound` keys counts as infinite."""
    left = -1 if left >= bound > 0 else left
    right = -1 if right >= bound > 0 else right
    right = 0 if causal else right
    if left < 0 and right == 0:
        return CAUSAL, left, right
    if left < 0 and right < 0:
        return NO_MASK, left, right
    return BAND, bound if left < 0 else left, bound if right < 0 else right


def kv_tiles(old: int, new: int) -> int:
    """An append starts a tile of its own."""
    return ceil_div(old, KV_TILE) + ceil_div(new, KV_TILE)


def fill(
    t: np.ndarray,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    paged_varlen: bool,
    num_splits: int,
    cores: int,
    cuts_windows: bool = False,
) -> None:
    """Sets the fields that follow from lengths. kv_lens come without the appended rows."""
    group = int(t["heads"]) // int(t["heads_k"])
    counts = [tasks(n, group, int(t["heads_k"])) for n in q_lens]
    t["first_tasks"], t["tasks"] = counts[0], sum(counts)
    new = int(t["new"])
    t["max_kv"] = longest = max(kv_lens) + new
    width = len(q_lens) * int(t["heads_k"])
    enough = (width <= 0.4 * cores and longest >= 1024) or (
        width <= 0.8 * cores and longest >= cores * KV_TILE
    )
    t["flash_decode"] = (
        paged_varlen
        and (t["mask"] != BAND or cuts_windows)
        and longest >= 1024
        and min(q_lens) > 0
        and max(q_lens) <= 16
        and max(q_lens) * group <= Q_TILE
        and enough
    )
    if t["flash_decode"]:
        _cut(t, q_lens, [kv_tiles(n, new) for n in kv_lens], kv_lens, num_splits, cores)


def _cut(
    t: np.ndarray,
    q_lens: Sequence[int],
    n_tiles: Sequence[int],
    kv_lens: Sequence[int],
    num_splits: int,
    cores: int,
) -> None:
    group, heads_k, new = int(t["heads"]) // int(t["heads_k"]), int(t["heads_k"]), int(t["new"])
    items = [
        (b, n)
        for b, q_len in enumerate(q_lens)
        for n in range(head_blocks(q_len, group)[1] * heads_k)
    ]
    spans: list[tuple[int, int, int, int]] = []  # (item, tile) to (item, end tile) for each core
    if num_splits >= 1:
        spans = [
            (i, first, i, min(first + step, n_tiles[b]))
            for i, (b, _) in enumerate(items)
            for step in [max(ceil_div(n_tiles[b], num_splits), 1)]
            for first in range(0, n_tiles[b], step)
        ]
        if len(spans) > min(cores, 25):
            spans = []
            if num_splits == 1:  # whole items, in equal shares
                share = ceil_div(len(items), cores)
                for first in range(0, len(items), share):
                    last = min(first + share, len(items)) - 1
                    spans.append((first, 0, last, n_tiles[items[last][0]]))
    if not spans:  # tile by tile, until a core has its share of the work
        work = [(q_lens[b] * head_blocks(q_lens[b], group)[0], b) for b, _ in items]
        total = int(t["heads"]) * sum(q * (kv + new) for q, kv in zip(q_lens, kv_lens, strict=True))
        share, spent, start = ceil_div(total, cores), 0, (0, 0)
        for i, (rows, b) in enumerate(work):
            tail = ((new or kv_lens[b]) - 1) % KV_TILE + 1
            for tile in range(n_tiles[b]):
                spent += rows * (KV_TILE if tile + 1 < n_tiles[b] else tail)
                if spent >= share and len(spans) < cores - 1:
                    spans.append((*start, i, tile + 1))
                    done = tile + 1 == n_tiles[b]
                    spent, start = 0, (i + 1, 0) if done else (i, tile + 1)
        if start[0] < len(items):
            spans.append((*start, len(items) - 1, n_tiles[-1]))
    t["cores_used"] = len(spans)
    rows_so_far, cuts, cut_item = 0, -1, -1
    for core, (i, tile, j, end) in zip(t["core"], spans, strict=False):
        core["start_b"], core["start_n"], core["start_tile"] = *items[i], tile
        core["end_b"], core["end_n"], core["end_tile"] = *items[j], end
        core["partial"] = rows_so_far
        for item in range(i, j + 1):
            b, n = items[item]
            covered = (end if item == j else n_tiles[b]) - (tile if item == i else 0)
            if not 0 < covered < n_tiles[b]:
                continue
            block, per_group = head_blocks(q_lens[b], group)
            head = n // per_group * group + n % per_group * block
            heads = min(block, (n // per_group + 1) * group - head)
            if item != cut_item:
                cuts, cut_item = cuts + 1, item
                t["cut"][cuts] = (b, head, heads, q_lens[b], 0, rows_so_far)
            t["cut"][cuts]["pieces"] += 1
            rows_so_far += heads * q_lens[b]
    t["cuts_used"] = cuts + 1
