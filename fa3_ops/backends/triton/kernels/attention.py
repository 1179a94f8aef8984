"""Attention: prefill, chunked prefill and decode from one source.

The rows of a tile are (token, head of the group), so that a block of keys is loaded once for a
group. Blocks of keys and chunks of CHUNK keys start at multiples of their sizes in the sequence. A
chunk starts from an empty state, and chunks are merged from left to right: here, or by `combine`
where every chunk is a work item of its own. What a row gives depends on neither.
"""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.keys import load_block, load_described
from fa3_ops.backends.triton.kernels.sequences import (
    bounded,
    key_rows,
    query_rows,
    range_of,
    visible,
)
from fa3_ops.backends.triton.kernels.softmax import (
    LOG2E,
    NONE,
    empty_state,
    finish,
    merge,
    tanh,
    weights,
)


@triton.jit
def tile_of(work, batch_size, nheads_k, tiles, num_chunks, NEIGHBOURS: tl.constexpr):
    """(sequence, KV head, tile of rows, chunk of keys). NEIGHBOURS pairs of sequence and KV head
    are at work together, so that their keys stay in cache; of each, the longest rows come first."""
    chunk = work % num_chunks
    work = work // num_chunks
    before = work // (NEIGHBOURS * tiles) * NEIGHBOURS
    work = work % (NEIGHBOURS * tiles)
    size = tl.minimum(NEIGHBOURS, batch_size * nheads_k - before)
    pair = before + work % size
    return pair // nheads_k, pair % nheads_k, tiles - 1 - work // size, chunk


@triton.jit
def chunk_of(low, high, chunk, num_chunks, CHUNK: tl.constexpr):
    """The positions of a chunk among low..high, which touch at most num_chunks of them: the one
    whose number in the sequence is `chunk` modulo num_chunks."""
    lowest = low // CHUNK
    number = lowest + (chunk - lowest % num_chunks + num_chunks) % num_chunks
    return tl.maximum(low, number * CHUNK), tl.minimum(high, number * CHUNK + CHUNK)


@triton.jit
def load_rows(
    x, token, head, exists, row_stride, head_stride, column, width,
    DIM: tl.constexpr, COMPUTE: tl.constexpr,
):
    """(rows, DIM) of q or qv, as numbers that products are made of."""
    columns = (column + tl.arange(0, DIM))[None, :]
    pointer = x + (token.to(tl.int64) * row_stride + head * head_stride)[:, None] + columns
    return tl.load(pointer, mask=exists[:, None] & (columns < width), other=0.0).to(COMPUTE)


@triton.jit
def rows_at(x, b, row, batch_stride, row_stride, cu_seqlens):
    """Where the rows of sequence b begin."""
    if cu_seqlens is None:
        x += b.to(tl.int64) * batch_stride
    else:
        x += row.to(tl.int64) * row_stride
    return x


@triton.jit
def first_row(b, row, seqlen_q, cu_seqlens_q):
    """The first row of sequence b among those of out."""
    if cu_seqlens_q is None:
        row = b * seqlen_q
    return row


@triton.jit
def lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q):
    """Where softmax_lse, (batch_size, nheads, seqlen_q) or (nheads, total_q), has its rows."""
    at = head.to(tl.int64) * total_q + row + token
    if cu_seqlens_q is None:
        at = (b.to(tl.int64) * nheads + head) * seqlen_q + token
    return at


@triton.jit
def store_rows(x, at, exists, rows, WIDTH: tl.constexpr, DIM: tl.constexpr):
    columns = tl.arange(0, DIM)[None, :]
    mask = exists[:, None] & (columns < WIDTH)
    tl.store(x + at[:, None] * WIDTH + columns, rows.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_part(
    part_out, part_ml, at, exists, m, total, acc, HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr
):
    store_rows(part_out, at, exists, acc, HEADDIM_V, DIM_V)
    tl.store(part_ml + at * 2, m, mask=exists)
    tl.store(part_ml + at * 2 + 1, total, mask=exists)


@triton.jit
def load_part(part_out, part_ml, at, exists, HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr):
    """A state as store_part wrote it, an empty one where there is none."""
    columns = tl.arange(0, DIM_V)[None, :]
    mask = exists[:, None] & (columns < HEADDIM_V)
    m = tl.load(part_ml + at * 2, mask=exists, other=NONE)
    total = tl.load(part_ml + at * 2 + 1, mask=exists, other=0.0)
    return m, total, tl.load(part_out + at[:, None] * HEADDIM_V + columns, mask=mask, other=0.0)


@triton.jit
def factors(
    b, head_k, softmax_scale, q_descale, k_descale, v_descale, qd_batch, qd_head, kd_batch, kd_head,
    vd_batch, vd_head, TRANSFORMED: tl.constexpr,
):
    """What is multiplied: products of q and k, and of qv and v, to be transformed; scores then;
    values."""
    scale = softmax_scale
    v_scale = 1.0
    if q_descale is not None:
        scale = scale * tl.load(q_descale + b * qd_batch + head_k * qd_head)
    if v_descale is not None:
        v_scale = tl.load(v_descale + b * vd_batch + head_k * vd_head)
    qv_scale = scale * v_scale
    if k_descale is not None:
        scale = scale * tl.load(k_descale + b * kd_batch + head_k * kd_head)
    c = scale * LOG2E
    if TRANSFORMED:
        c = LOG2E
    return scale, qv_scale, c, v_scale


@triton.jit
def entry_of(b, entries, cache_batch_idx):
    """The batch entry of k and v, or the row of the page table, of sequence b."""
    entry = b
    if cache_batch_idx is not None:
        entry = bounded(tl.load(cache_batch_idx + b), 0, entries - 1)
    return entry.to(tl.int64)


@triton.jit
def load_keys(
    x, described, pages, block, shift, entry, head_k, low, high, stride, page_stride, num_pages,
    capacity, column, width, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    DIM: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):
    if MASKED or described is None:
        return load_block(
            x, pages, block, shift, low, high, stride, page_stride, num_pages, capacity, column,
            width, LAYOUT, PAGE_SIZE, BLOCK_N, DIM, EVEN, MASKED,
        )
    else:
        return load_described(
            described, pages, block, shift, entry, head_k, num_pages, column,
            LAYOUT, PAGE_SIZE, BLOCK_N, DIM,
        )


@triton.jit
def attend_block(
    q, q_rest, qv, k, v, k_described, k_rest_described, v_described, pages, entry, head_k,
    block, shift, low, high, begin, stop, diagonal, slope, k_row, k_page, v_row, v_page,
    num_pages, capacity, scale, qv_scale, softcap, c, m, total, acc,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TRANSFORMED: tl.constexpr, MASKED: tl.constexpr,
):
    """The state after one block of keys."""
    keys = load_keys(
        k, k_described, pages, block, shift, entry, head_k, low, high, k_row, k_page, num_pages,
        capacity, 0, HEADDIM, LAYOUT, PAGE_SIZE, BLOCK_N, DIM, HEADDIM >= DIM, MASKED,
    ).to(COMPUTE)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if DIM_REST > 0:
        keys = load_keys(
            k, k_rest_described, pages, block, shift, entry, head_k, low, high, k_row, k_page,
            num_pages, capacity, DIM, HEADDIM, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_REST,
            HEADDIM == DIM + DIM_REST, MASKED,
        ).to(COMPUTE)
        scores = tl.dot(q_rest, tl.trans(keys), scores, input_precision="ieee")
    if TRANSFORMED:
        scores = scores * scale
    if qv is not None:
        values = load_keys(
            v, v_described, pages, block, shift, entry, head_k, low, high, v_row, v_page,
            num_pages, capacity, 0, HEADDIM_V, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_V,
            HEADDIM_V == DIM_V, MASKED,
        ).to(COMPUTE)
        if TRANSFORMED:
            scores += tl.dot(qv, tl.trans(values), input_precision="ieee") * qv_scale
        else:
            scores = tl.dot(qv, tl.trans(values), scores, input_precision="ieee")
    position = block + tl.arange(0, BLOCK_N)[None, :]
    if softcap is not None:
        scores = tanh(scores / softcap) * softcap
    if slope is not None:
        distance = tl.abs(diagonal[:, None] - position).to(tl.float32)
        scores = scores - slope[:, None] * distance
    if MASKED:
        seen = (position >= begin[:, None]) & (position < stop[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    p, m, total, alpha = weights(scores, m, total, c, COMPUTE == tl.float32)
    if qv is None:
        values = load_keys(
            v, v_described, pages, block, shift, entry, head_k, low, high, v_row, v_page,
            num_pages, capacity, 0, HEADDIM_V, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_V,
            HEADDIM_V == DIM_V, MASKED,
        ).to(COMPUTE)
    return m, total, tl.dot(p.to(COMPUTE), values, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def attend(
    q, qv, k, v, k_described, k_rest_described, v_described, pages, entry, head_k, alibi_slopes,
    token, head, exists, rows, shift, first, end, low, full, high,
    window_left, window_right, attention_chunk, q_row, q_head, qv_row, qv_head,
    k_row, k_page, v_row, v_page, num_pages, capacity, scale, qv_scale, softcap, c,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TRANSFORMED: tl.constexpr, LOWER: tl.constexpr, FOLD: tl.constexpr,
):
    """The state of a tile of rows after the keys of low..high."""
    begin, stop = visible(
        token, rows, first, end, window_left, window_right, attention_chunk
    )
    stop = tl.where(token < rows, stop, begin)
    diagonal = token + end - rows
    q_tile = load_rows(q, token, head, exists, q_row, q_head, 0, HEADDIM, DIM, COMPUTE)
    q_rest = q_tile
    if DIM_REST > 0:
        q_rest = load_rows(q, token, head, exists, q_row, q_head, DIM, HEADDIM, DIM_REST, COMPUTE)
    qv_tile = None
    if qv is not None:
        qv_tile = load_rows(qv, token, head, exists, qv_row, qv_head, 0, HEADDIM_V, DIM_V, COMPUTE)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=exists, other=0.0)

    block_of_low = low // BLOCK_N * BLOCK_N
    full = block_of_low + tl.maximum(full - block_of_low, 0) // BLOCK_N * BLOCK_N
    if LOWER:
        full = block_of_low
    m_all, total_all, acc_all = empty_state(BLOCK_M, DIM_V)
    m, total, acc = empty_state(BLOCK_M, DIM_V)
    for MASKED in tl.static_range(1 if LOWER else 0, 2):
        for block in range(full if MASKED else block_of_low, high if MASKED else full, BLOCK_N):
            if FOLD:
                if block % CHUNK == 0:
                    m_all, total_all, acc_all = merge(m_all, total_all, acc_all, m, total, acc, c)
                    m, total, acc = empty_state(BLOCK_M, DIM_V)
            m, total, acc = attend_block(
                q_tile, q_rest, qv_tile, k, v, k_described, k_rest_described, v_described,
                pages, entry, head_k, block, shift, low, high, begin, stop, diagonal, slope,
                k_row, k_page, v_row, v_page, num_pages, capacity, scale, qv_scale, softcap, c,
                m, total, acc, HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, BLOCK_N,
                COMPUTE, LAYOUT, PAGE_SIZE, TRANSFORMED, MASKED == 1,
            )
    if FOLD:
        m, total, acc = merge(m_all, total_all, acc_all, m, total, acc, c)
    return m, total, acc


@triton.jit(do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "capacity", "entries", "num_pages", "tiles", "num_chunks",
    "work_items", "softmax_scale", "softcap", "window_left", "window_right", "attention_chunk",
])
def attention(
    q, k, v, qv, k_described, k_rest_described, v_described, out, softmax_lse, part_out, part_ml,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_batch_idx, cache_leftpad, cache_start,
    page_table, q_descale, k_descale, v_descale, alibi_slopes, sinks,
    batch_size, seqlen_q, total_q, capacity, entries, num_pages, tiles, num_chunks, work_items,
    softmax_scale, softcap, window_left, window_right, attention_chunk,
    q_batch, q_row, q_head, qv_batch, qv_row, qv_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, table_row, qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head,
    alibi_batch, nheads_k,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr,
    DIM_REST: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TRANSFORMED: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    """Writes out (rows, nheads, headdim_v) and softmax_lse, or with SPLIT the state of a chunk:
    part_out (rows, nheads, num_chunks, headdim_v) and part_ml (rows, nheads, num_chunks, 2)."""
    LOWER: tl.constexpr = (
        window_left is not None or attention_chunk is not None or cache_start is not None
    )
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        b, head_k, tile, chunk = tile_of(work, batch_size, nheads_k, tiles, num_chunks, NEIGHBOURS)
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        shift, first, end = key_rows(
            b, capacity, cu_seqlens_k, seqused_k, cache_leftpad, cache_start
        )
        low, full, high = range_of(
            tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP, rows, first, end,
            window_left, window_right, attention_chunk,
        )
        if SPLIT:
            low, high = chunk_of(low, high, chunk, num_chunks, CHUNK)
            full = tl.minimum(full, high)
        token = (tile * BLOCK_M + tl.arange(0, BLOCK_M)) // GROUP
        head = head_k * GROUP + (tile * BLOCK_M + tl.arange(0, BLOCK_M)) % GROUP
        rows_of_out = seqlen_q if cu_seqlens_q is None else rows
        exists = token < rows_of_out
        if (tile * BLOCK_M // GROUP < rows_of_out) & ((low < high) | (not SPLIT)):
            scale, qv_scale, c, v_scale = factors(
                b, head_k, softmax_scale, q_descale, k_descale, v_descale,
                qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, TRANSFORMED,
            )
            entry = entry_of(b, entries, cache_batch_idx)
            k_rows = k + head_k * k_head
            v_rows = v + head_k * v_head
            pages = page_table
            if page_table is not None:
                pages = page_table + entry * table_row
            elif cu_seqlens_k is None:
                k_rows += entry * k_batch
                v_rows += entry * v_batch
            qv_rows = qv
            if qv is not None:
                qv_rows = rows_at(qv, b, row, qv_batch, qv_row, cu_seqlens_q)
            slopes = alibi_slopes
            if alibi_slopes is not None:
                slopes = alibi_slopes + b * alibi_batch
            m, total, acc = attend(
                rows_at(q, b, row, q_batch, q_row, cu_seqlens_q), qv_rows,
                k_rows, v_rows, k_described, k_rest_described, v_described, pages,
                entry if cu_seqlens_k is None else entry * 0, head_k, slopes, token, head, exists, rows, shift, first, end,
                low, full, high, window_left, window_right, attention_chunk,
                q_row, q_head, qv_row, qv_head, k_row, k_batch, v_row, v_batch, num_pages, capacity,
                scale, qv_scale, softcap, c,
                HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, BLOCK_M, BLOCK_N, CHUNK, COMPUTE,
                LAYOUT, PAGE_SIZE, TRANSFORMED, LOWER, FOLD,
            )
            nheads = nheads_k * GROUP
            at = (first_row(b, row, seqlen_q, cu_seqlens_q) + token).to(tl.int64) * nheads + head
            if SPLIT:
                store_part(
                    part_out, part_ml, at * num_chunks + chunk, exists, m, total, acc, HEADDIM_V, DIM_V
                )
            else:
                acc, lse = finish(m, total, acc, c, sinks, head, exists, v_scale)
                store_rows(out, at, exists, acc, HEADDIM_V, DIM_V)
                at = lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q)
                tl.store(softmax_lse + at, lse, mask=exists)


@triton.jit(do_not_specialize=[
    "seqlen_q", "total_q", "capacity", "num_chunks", "work_items", "softmax_scale",
    "window_left", "window_right", "attention_chunk",
])
def combine(
    part_out, part_ml, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    cache_leftpad, cache_start, q_descale, k_descale, v_descale, sinks,
    seqlen_q, total_q, capacity, num_chunks, work_items, softmax_scale,
    window_left, window_right, attention_chunk,
    qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, nheads_k,
    GROUP: tl.constexpr, HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, TRANSFORMED: tl.constexpr, UNROLL: tl.constexpr,
):
    """Merges the chunks of SPLIT for a row of q, in order."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        nheads = nheads_k * GROUP
        head = work % nheads + tl.arange(0, 1)
        token = work // nheads % seqlen_q
        b = work // nheads // seqlen_q
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        shift, first, end = key_rows(
            b, capacity, cu_seqlens_k, seqused_k, cache_leftpad, cache_start
        )
        low, full, high = range_of(
            token, token, rows, first, end, window_left, window_right, attention_chunk
        )
        if token < (seqlen_q if cu_seqlens_q is None else rows):
            scale, qv_scale, c, v_scale = factors(
                b, work % nheads // GROUP, softmax_scale, q_descale, k_descale, v_descale,
                qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, TRANSFORMED,
            )
            at = (first_row(b, row, seqlen_q, cu_seqlens_q) + token).to(tl.int64) * nheads + head
            m, total, acc = empty_state(1, DIM_V)
            last_chunk = tl.where(low < high, (high + CHUNK - 1) // CHUNK, 0)
            for chunk in range(low // CHUNK, last_chunk, UNROLL):
                for i in tl.static_range(UNROLL):
                    m_next, total_next, acc_next = load_part(
                        part_out, part_ml, at * num_chunks + (chunk + i) % num_chunks,
                        head * 0 + chunk + i < last_chunk, HEADDIM_V, DIM_V,
                    )
                    m, total, acc = merge(m, total, acc, m_next, total_next, acc_next, c)
            exists = head >= 0
            acc, lse = finish(m, total, acc, c, sinks, head, exists, v_scale)
            store_rows(out, at, exists, acc, HEADDIM_V, DIM_V)
            at = lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q)
            tl.store(softmax_lse + at, lse, mask=exists)
