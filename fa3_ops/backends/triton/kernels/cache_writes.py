"""New keys and values for a cache: rotated, quantised, put where they belong."""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.numbers import PLAIN, quantised
from fa3_ops.backends.triton.kernels.rotary import rotated
from fa3_ops.backends.triton.kernels.sequences import LENGTHS, bounded, row_of


@triton.jit
def place_of(
    b, position, cache_batch_idx, page_table, table_row, table_entries, table_width,
    pages, page_size,
):
    """(page or batch entry, row in it, whether the cache has it) of a position of sequence b."""
    entry = b
    if cache_batch_idx is not None:
        entry = tl.load(cache_batch_idx + b)
    exists = position >= 0
    page = entry
    row = position
    if page_table is None:
        exists = exists & (position < page_size)
    else:
        column = position // page_size
        exists = exists & (column < table_width) & (entry >= 0) & (entry < table_entries)
        entry = bounded(entry, 0, table_entries - 1).to(tl.int64)
        page = tl.load(page_table + entry * table_row + bounded(column, 0, table_width - 1))
        row = position % page_size
    return page, row, exists & (page >= 0) & (page < pages)


@triton.jit
def put(cache, at, x, mask, descale, FORMAT: tl.constexpr):
    """Writes numbers as a cache has them, which is as they are unless it has a narrow FORMAT."""
    if FORMAT != PLAIN:
        descale = tl.broadcast_to(descale[:, None], x.shape)
        x = quantised(tl.div_rn(x.to(tl.float32), descale), FORMAT)
    tl.store(cache + at, x, mask=mask)


@triton.jit
def put_rows(
    cache, cache_at, x, at, exists, begin, descale,
    WIDTH: tl.constexpr, DIM: tl.constexpr, FORMAT: tl.constexpr,
):
    """The columns from `begin` on."""
    columns = tl.arange(0, DIM)[None, :]
    mask = exists[:, None] & (columns >= begin) & (columns < WIDTH)
    put(
        cache, cache_at[:, None] + columns, tl.load(x + at[:, None] + columns, mask=mask), mask,
        descale, FORMAT,
    )


@triton.jit
def descale_of(descale, b, head, exists, batch_stride, head_stride):
    if descale is None:
        return tl.full(head.shape, 1.0, tl.float32)
    else:
        return tl.load(descale + b * batch_stride + head * head_stride, mask=exists, other=1.0)


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "rows", "pages", "page_size", "table_entries", "table_width", "positions",
    "nheads_k", "head_blocks", "work_items", "table_row", "kd_batch", "kd_head", "vd_batch",
    "vd_head",
])
def cache_writes(
    k, v, k_cache, v_cache, slot_mapping, cache_seqlens, cu_seqlens_k_new, cache_batch_idx,
    page_table, rotary_cos, rotary_sin, rotary_seqlens, k_descale, v_descale,
    batch_size, rows, pages, page_size, table_entries, table_width, positions, nheads_k,
    head_blocks, work_items,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_page, kc_row, kc_head, vc_page, vc_row, vc_head, table_row,
    cos_row, sin_row, kd_batch, kd_head, vd_batch, vd_head,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAIRS: tl.constexpr, PAIRS_DIM: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr, WIDE: tl.constexpr,
):
    """Row i of sequence b goes to position cache_seqlens[b] + i, or with slot_mapping row i to slot
    i; what the caches have no place for is left out. k has FORMAT, its cache K_FORMAT or that."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        index = work // head_blocks
        b, i, exists = row_of(index, rows, batch_size, cu_seqlens_k_new)
        if slot_mapping is not None:
            slot = tl.load(slot_mapping + index).to(tl.int64)
            page, row = slot // page_size, slot % page_size
            exists = (slot >= 0) & (page < pages)
        else:
            page, row, placed = place_of(
                b, tl.load(cache_seqlens + b) + i, cache_batch_idx, page_table, table_row,
                table_entries, table_width, pages, page_size,
            )
            exists = exists & placed
        if exists:
            head = (work % head_blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            heads = head < nheads_k
            from_row = index.to(tl.int64)
            if cu_seqlens_k_new is None:
                from_row = i.to(tl.int64)
            at = b.to(tl.int64) * k_batch + from_row * k_row + head * k_head
            to = page.to(tl.int64) * kc_page + row.to(tl.int64) * kc_row + head * kc_head
            descale = descale_of(k_descale, b, head, heads, kd_batch, kd_head)
            if rotary_cos is not None:
                position = bounded(tl.load(rotary_seqlens + b) + i, 0, positions - 1).to(tl.int64)
                first, second, mask, y, z = rotated(
                    k, at, heads, rotary_cos + position * cos_row, rotary_sin + position * sin_row,
                    PAIRS, PAIRS_DIM, INTERLEAVED, FORMAT, WIDE,
                )
                put(k_cache, to[:, None] + first, y, mask, descale, K_FORMAT)
                put(k_cache, to[:, None] + second, z, mask, descale, K_FORMAT)
            if 2 * PAIRS < WIDTH:
                put_rows(k_cache, to, k, at, heads, 2 * PAIRS, descale, WIDTH, DIM, K_FORMAT)
            at = b.to(tl.int64) * v_batch + from_row * v_row + head * v_head
            to = page.to(tl.int64) * vc_page + row.to(tl.int64) * vc_row + head * vc_head
            descale = descale_of(v_descale, b, head, heads, vd_batch, vd_head)
            put_rows(v_cache, to, v, at, heads, 0, descale, WIDTH_V, DIM_V, V_FORMAT)
