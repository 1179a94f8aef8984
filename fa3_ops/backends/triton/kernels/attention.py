"""Attention: prefill, chunked prefill and decode from one source.

The rows of a tile are TOKENS tokens of HEADS heads each, all of one KV head, so that a block of
keys is loaded once for them. Blocks of keys and chunks of CHUNK keys start at multiples of their
sizes in the sequence. A chunk starts from an empty state, and chunks are merged from left to right:
here, or by `combine` where every chunk is a work item of its own. What a row gives depends on
neither.
"""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.keys import load_block, load_described, pages_of
from fa3_ops.backends.triton.kernels.narrow import (
    in_order,
    largest_bits,
    product,
    scaled_to_float16,
    unit_of_scaled,
    weighted,
)
from fa3_ops.backends.triton.kernels.overlap import start_dependents, wait_for_predecessor
from fa3_ops.backends.triton.kernels.rows import (
    load_of_heads,
    load_rows,
    of_tokens,
    store_by_heads,
    store_numbers,
    store_rows,
)
from fa3_ops.backends.triton.kernels.sequences import (
    LENGTHS,
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
def rows_at(x, b, row, token, head, batch_stride, row_stride, head_stride, cu_seqlens):
    """Where a token and head of sequence b is."""
    if cu_seqlens is None:
        x += b.to(tl.int64) * batch_stride
    else:
        x += row.to(tl.int64) * row_stride
    return x + token.to(tl.int64) * row_stride + head * head_stride


@triton.jit
def first_row(b, row, seqlen_q, cu_seqlens_q):
    """The first row of sequence b among those of out."""
    if cu_seqlens_q is None:
        row = b * seqlen_q
    return row


@triton.jit
def lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q):
    """Where softmax_lse, (batch_size, nheads, seqlen_q) or (nheads, total_q), has a row."""
    at = (b.to(tl.int64) * nheads + head) * seqlen_q + token
    if cu_seqlens_q is not None:
        at = head.to(tl.int64) * total_q + row + token
    return at


@triton.jit
def store_results(
    out, softmax_lse, rows, lse, b, row, token, head, tokens, heads, nheads, seqlen_q, total_q,
    cu_seqlens_q,
    HEADDIM_V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM_V: tl.constexpr,
):
    """To out (rows, nheads, headdim_v) and softmax_lse."""
    at = (first_row(b, row, seqlen_q, cu_seqlens_q) + token).to(tl.int64) * nheads + head
    store_rows(
        out + at * HEADDIM_V, rows, tokens, heads, HEADDIM_V, nheads * HEADDIM_V, HEADDIM_V,
        TOKENS, HEADS, DIM_V,
    )
    at = lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q)
    stride = seqlen_q if cu_seqlens_q is None else total_q
    store_by_heads(softmax_lse + at, lse, tokens, heads, stride, TOKENS, HEADS)


@triton.jit
def store_part(
    part_out, part_ml, at, parts, nheads, m, total, acc, tokens, heads,
    HEADDIM_V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM_V: tl.constexpr,
):
    store_rows(
        part_out + at * HEADDIM_V, acc, tokens, heads, HEADDIM_V, nheads * HEADDIM_V, HEADDIM_V,
        TOKENS, HEADS, DIM_V,
    )
    store_numbers(part_ml + at, m, tokens, heads, nheads, TOKENS, HEADS)
    store_numbers(part_ml + parts + at, total, tokens, heads, nheads, TOKENS, HEADS)


@triton.jit
def load_part(
    part_out, part_ml, at, parts, exists, HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr
):
    """The state of a row as store_part wrote it, an empty one unless it exists. Numbers are loaded
    as scalars: the compiler takes long to lay out tensors of one."""
    m = tl.broadcast_to(tl.load(part_ml + at, mask=exists, other=NONE), [1])
    total = tl.broadcast_to(tl.load(part_ml + parts + at, mask=exists, other=0.0), [1])
    column = tl.arange(0, DIM_V)[None, :]
    there = exists & (column < HEADDIM_V)
    return m, total, tl.load(part_out + at * HEADDIM_V + column, mask=there, other=0.0)


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
    x, described, page, block, shift, entry, head_k, low, high, stride, page_stride,
    capacity, column, width, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    DIM: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):
    if MASKED or described is None:
        return load_block(
            x, page, block, shift, low, high, stride, page_stride, capacity, column,
            width, LAYOUT, PAGE_SIZE, BLOCK_N, DIM, EVEN, MASKED,
        )
    else:
        return load_described(
            described, page, block, shift, entry, head_k, column,
            LAYOUT, PAGE_SIZE, BLOCK_N, DIM,
        )


@triton.jit
def attend_block(
    q, q_rest, qv, k, v, k_described, k_rest_described, v_described, page, entry, head_k,
    block, shift, low, high, begin, stop, diagonal, slope, k_row, k_page, v_row, v_page,
    num_pages, capacity, scale, qv_scale, softcap, c, unit, m, total, acc,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TRANSFORMED: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr,
):
    """The state after one block of keys."""
    PER: tl.constexpr = 1 if FORMAT is None else 2
    page = bounded(page, 0, num_pages - 1)
    keys = load_keys(
        k, k_described, page, block, shift, entry, head_k, low, high, k_row, k_page,
        capacity, 0, HEADDIM // PER, LAYOUT, PAGE_SIZE, BLOCK_N, DIM // PER, HEADDIM >= DIM, MASKED,
    )
    nothing = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    scores = product(q, keys, nothing, FORMAT)
    if DIM_REST > 0:
        keys = load_keys(
            k, k_rest_described, page, block, shift, entry, head_k, low, high, k_row, k_page,
            capacity, DIM // PER, HEADDIM // PER, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_REST // PER,
            HEADDIM == DIM + DIM_REST, MASKED,
        )
        scores = product(q_rest, keys, scores, FORMAT)
    if TRANSFORMED:
        scores = scores * scale
    if qv is not None:
        values = load_keys(
            v, v_described, page, block, shift, entry, head_k, low, high, v_row, v_page,
            capacity, 0, HEADDIM_V // PER, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_V // PER,
            HEADDIM_V == DIM_V, MASKED,
        )
        if TRANSFORMED:
            scores += product(qv, values, nothing, FORMAT) * qv_scale
        else:
            scores = product(qv, values, scores, FORMAT)
    if unit is not None:
        scores = scores * unit[:, None]
    position = block + tl.arange(0, BLOCK_N)[None, :]
    if softcap is not None:
        scores = tanh(scores / softcap) * softcap
    if slope is not None:
        distance = tl.abs(diagonal[:, None] - position).to(tl.float32)
        scores = scores - slope[:, None] * distance
    if MASKED:
        seen = (position >= begin[:, None]) & (position < stop[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    p, m, total, alpha = weights(scores, m, total, c, tl.float32 == COMPUTE)
    if qv is None:
        values = load_keys(
            v, v_described, page, block, shift, entry, head_k, low, high, v_row, v_page,
            capacity, 0, HEADDIM_V // PER, LAYOUT, PAGE_SIZE, BLOCK_N, DIM_V // PER,
            HEADDIM_V == DIM_V, MASKED,
        )
    return m, total, weighted(p.to(COMPUTE), values, acc * alpha[:, None], FORMAT)


@triton.jit
def attend(
    q, qv, k, v, k_described, k_rest_described, v_described, pages, entry, head_k, alibi_slopes,
    token, tokens, heads, rows, shift, first, end, low, full, high,
    window_left, window_right, attention_chunk, q_row, q_head, qv_row, qv_head,
    k_row, k_page, v_row, v_page, num_pages, capacity, scale, qv_scale, softcap, c,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr, LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TRANSFORMED: tl.constexpr, LOWER: tl.constexpr, FOLD: tl.constexpr, FORMAT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The state of a tile of rows after the keys of low..high. k and v are pairs of a FORMAT, if
    that is given; AHEAD a block's pages are looked up while the block before it is at work."""
    BLOCK_M: tl.constexpr = TOKENS * HEADS
    at = of_tokens(token + tl.arange(0, TOKENS), TOKENS, HEADS)
    begin, stop = visible(at, rows, first, end, window_left, window_right, attention_chunk)
    stop = tl.where(at < rows, stop, begin)
    diagonal = at + end - rows
    q_tile = load_rows(q, tokens, heads, HEADDIM, q_row, q_head, TOKENS, HEADS, DIM)
    q_rest = q_tile
    if DIM_REST > 0:
        q_rest = load_rows(
            q + DIM, tokens, heads, HEADDIM - DIM, q_row, q_head, TOKENS, HEADS, DIM_REST
        )
    qv_tile = None
    if qv is not None:
        qv_tile = load_rows(qv, tokens, heads, HEADDIM_V, qv_row, qv_head, TOKENS, HEADS, DIM_V)
    unit = None
    SCALED: tl.constexpr = (q_tile.dtype == tl.bfloat16) & (tl.float16 == COMPUTE)
    if SCALED:
        largest = tl.maximum(largest_bits(q_tile), largest_bits(q_rest))
        if qv is not None:
            largest = tl.maximum(largest, largest_bits(qv_tile))
            qv_tile = scaled_to_float16(qv_tile, largest)
        q_tile, q_rest = scaled_to_float16(q_tile, largest), scaled_to_float16(q_rest, largest)
        unit = unit_of_scaled(largest)
    q_tile, q_rest = q_tile.to(COMPUTE), q_rest.to(COMPUTE)
    if qv is not None:
        qv_tile = qv_tile.to(COMPUTE)
    slope = None
    if alibi_slopes is not None:
        slope = load_of_heads(alibi_slopes, heads, TOKENS, HEADS)

    block_of_low = low // BLOCK_N * BLOCK_N
    full = block_of_low + tl.maximum(full - block_of_low, 0) // BLOCK_N * BLOCK_N
    if LOWER:
        full = block_of_low
    m_all, total_all, acc_all = empty_state(BLOCK_M, DIM_V)
    m, total, acc = empty_state(BLOCK_M, DIM_V)
    for MASKED in tl.static_range(1 if LOWER else 0, 2):
        begins = full if MASKED else block_of_low
        ends = high if MASKED else full
        if begins < ends:  # else what comes before a loop would be done for nothing
            page = pages_of(pages, begins, shift, capacity, LAYOUT, PAGE_SIZE, BLOCK_N)
            for block in range(begins, ends, BLOCK_N):
                if FOLD:
                    if block % CHUNK == 0:
                        m_all, total_all, acc_all = merge(
                            m_all, total_all, acc_all, m, total, acc, c
                        )
                        m, total, acc = empty_state(BLOCK_M, DIM_V)
                if not AHEAD:
                    page = pages_of(pages, block, shift, capacity, LAYOUT, PAGE_SIZE, BLOCK_N)
                m, total, acc = attend_block(
                    q_tile, q_rest, qv_tile, k, v, k_described, k_rest_described, v_described,
                    page, entry, head_k, block, shift, low, high, begin, stop, diagonal, slope,
                    k_row, k_page, v_row, v_page, num_pages, capacity, scale, qv_scale, softcap, c,
                    unit, m, total, acc, HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, BLOCK_N,
                    COMPUTE, LAYOUT, PAGE_SIZE, TRANSFORMED, FORMAT, MASKED == 1,
                )
                if AHEAD:
                    next_block = block + BLOCK_N
                    page = pages_of(pages, next_block, shift, capacity, LAYOUT, PAGE_SIZE, BLOCK_N)
    if FOLD:
        m, total, acc = merge(m_all, total_all, acc_all, m, total, acc, c)
    if FORMAT is not None:
        acc = in_order(acc)
    return m, total, acc


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "capacity", "entries", "num_pages", "tiles", "num_chunks",
    "work_items", "softmax_scale", "softcap", "window_left", "window_right", "attention_chunk",
    "table_row", "qd_batch", "qd_head", "kd_batch", "kd_head", "vd_batch", "vd_head", "alibi_batch",
    "part_stride", "nheads_k",
])
def attention(
    q, k, v, qv, k_described, k_rest_described, v_described, out, softmax_lse, part_out, part_ml,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_batch_idx, cache_leftpad, cache_start,
    page_table, q_descale, k_descale, v_descale, alibi_slopes, sinks,
    batch_size, seqlen_q, total_q, capacity, entries, num_pages, tiles, num_chunks, work_items,
    softmax_scale, softcap, window_left, window_right, attention_chunk,
    q_batch, q_row, q_head, qv_batch, qv_row, qv_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, table_row, qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head,
    alibi_batch, part_stride, nheads_k,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr,
    DIM_REST: tl.constexpr, DIM_V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr, LAYOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TRANSFORMED: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr,
    NEIGHBOURS: tl.constexpr, FORMAT: tl.constexpr, AHEAD: tl.constexpr, OVERLAPPED: tl.constexpr,
):
    """Writes out (rows, nheads, headdim_v) and softmax_lse, or with SPLIT the state of a chunk:
    part_out (num_chunks, rows, nheads, headdim_v) and part_ml (2, num_chunks, rows, nheads)."""
    LIMITED: tl.constexpr = window_left is not None or attention_chunk is not None
    # Products of floats are unrolled: one loop, with masks, is compiled in half the time of two.
    LOWER: tl.constexpr = LIMITED or (cache_start is not None or tl.float32 == COMPUTE)
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        b, head_k, tile, chunk = tile_of(work, batch_size, nheads_k, tiles, num_chunks, NEIGHBOURS)
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        shift, first, end = key_rows(
            b, capacity, cu_seqlens_k, seqused_k, cache_leftpad, cache_start
        )
        token = tile // HEAD_BLOCKS * TOKENS
        heads = GROUP - tile % HEAD_BLOCKS * HEADS
        head = head_k * GROUP + tile % HEAD_BLOCKS * HEADS
        low, full, high = range_of(
            token, token + TOKENS - 1, rows, first, end, window_left, window_right, attention_chunk
        )
        if SPLIT:
            low, high = chunk_of(low, high, chunk, num_chunks, CHUNK)
            full = tl.minimum(full, high)
        tokens = (seqlen_q if cu_seqlens_q is None else rows) - token
        if (tokens > 0) & ((low < high) | (not SPLIT)):
            scale, qv_scale, c, v_scale = factors(
                b, head_k, softmax_scale, q_descale, k_descale, v_descale,
                qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, TRANSFORMED,
            )
            entry = entry_of(b, entries, cache_batch_idx)
            k_rows = k + head_k.to(tl.int64) * k_head
            v_rows = v + head_k.to(tl.int64) * v_head
            pages = page_table
            if page_table is not None:
                pages = page_table + entry * table_row
            elif cu_seqlens_k is None:
                k_rows += entry * k_batch
                v_rows += entry * v_batch
            q_rows = rows_at(q, b, row, token, head, q_batch, q_row, q_head, cu_seqlens_q)
            qv_rows = qv
            if qv is not None:
                qv_rows = rows_at(qv, b, row, token, head, qv_batch, qv_row, qv_head, cu_seqlens_q)
            slopes = alibi_slopes
            if alibi_slopes is not None:
                slopes = alibi_slopes + b * alibi_batch + head
            m, total, acc = attend(
                q_rows, qv_rows, k_rows, v_rows, k_described, k_rest_described, v_described, pages,
                entry if cu_seqlens_k is None else entry * 0, head_k, slopes, token, tokens, heads,
                rows, shift, first, end, low, full, high,
                window_left, window_right, attention_chunk, q_row, q_head, qv_row, qv_head,
                k_row, k_batch, v_row, v_batch, num_pages, capacity, scale, qv_scale, softcap, c,
                HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, TOKENS, HEADS, BLOCK_N, CHUNK, COMPUTE,
                LAYOUT, PAGE_SIZE, TRANSFORMED, LOWER, FOLD, FORMAT, AHEAD,
            )
            nheads = nheads_k * GROUP
            if SPLIT:
                if OVERLAPPED:
                    start_dependents()
                at = (first_row(b, row, seqlen_q, cu_seqlens_q) + token).to(tl.int64)
                at = at * nheads + head + chunk * part_stride
                store_part(
                    part_out, part_ml, at, num_chunks * part_stride, nheads, m, total, acc,
                    tokens, heads, HEADDIM_V, TOKENS, HEADS, DIM_V,
                )
            else:
                sink = None
                if sinks is not None:
                    sink = load_of_heads(sinks + head, heads, TOKENS, HEADS)
                acc, lse = finish(m, total, acc, c, sink, v_scale)
                store_results(
                    out, softmax_lse, acc, lse, b, row, token, head, tokens, heads, nheads,
                    seqlen_q, total_q, cu_seqlens_q, HEADDIM_V, TOKENS, HEADS, DIM_V,
                )


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "seqlen_q", "total_q", "capacity", "num_chunks", "work_items", "softmax_scale",
    "window_left", "window_right", "attention_chunk",
    "qd_batch", "qd_head", "kd_batch", "kd_head", "vd_batch", "vd_head", "part_stride", "nheads_k",
])
def combine(
    part_out, part_ml, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    cache_leftpad, cache_start, q_descale, k_descale, v_descale, sinks,
    seqlen_q, total_q, capacity, num_chunks, work_items, softmax_scale,
    window_left, window_right, attention_chunk,
    qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, part_stride, nheads_k,
    GROUP: tl.constexpr, HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr,
    CHUNK: tl.constexpr, TRANSFORMED: tl.constexpr, UNROLL: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """Merges the chunks of SPLIT for one head of a token, in order."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        nheads = nheads_k * GROUP
        head = work % nheads
        head_k = head // GROUP
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
                b, head_k, softmax_scale, q_descale, k_descale, v_descale,
                qd_batch, qd_head, kd_batch, kd_head, vd_batch, vd_head, TRANSFORMED,
            )
            at = (first_row(b, row, seqlen_q, cu_seqlens_q) + token).to(tl.int64) * nheads + head
            m, total, acc = empty_state(1, DIM_V)
            if OVERLAPPED:
                wait_for_predecessor()
            lowest = low // CHUNK
            chunks = tl.where(low < high, (high + CHUNK - 1) // CHUNK, lowest) - lowest
            lowest = lowest % num_chunks
            for chunk in range(0, chunks, UNROLL):
                for i in tl.static_range(UNROLL):
                    place = lowest + tl.minimum(chunk + i, chunks - 1)
                    place = tl.where(place < num_chunks, place, place - num_chunks)
                    m_next, total_next, acc_next = load_part(
                        part_out, part_ml, at + place * part_stride,
                        num_chunks * part_stride, chunk + i < chunks, HEADDIM_V, DIM_V,
                    )
                    m, total, acc = merge(m, total, acc, m_next, total_next, acc_next, c)
            sink = None
            if sinks is not None:
                sink = load_of_heads(sinks + head, 1, 1, 1)
            acc, lse = finish(m, total, acc, c, sink, v_scale)
            store_results(
                out, softmax_lse, acc, lse, b, row, token, head, 1, 1, nheads, seqlen_q,
                total_q, cu_seqlens_q, HEADDIM_V, 1, 1, DIM_V,
            )
