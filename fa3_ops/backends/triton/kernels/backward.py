"""The gradient: P = exp(S - LSE), dS = P (dP - delta) and delta = rowsum(dout out) - dLSE.

dk and dv of a block of keys are sums of one program, over the heads of the group and their rows in
order; dq of a block of rows is one over its keys. Blocks start at multiples of their sizes in the
sequence, so that no sum depends on a schedule. A row or key that is not seen adds exact zeros.
"""
# fmt: off

import triton
import triton.language as tl

from fa3_ops.backends.triton.kernels.attention import first_row, lse_at, tile_of
from fa3_ops.backends.triton.kernels.keys import ROWS, load_block
from fa3_ops.backends.triton.kernels.sequences import (
    LENGTHS,
    key_rows,
    query_rows,
    range_of,
    visible,
)
from fa3_ops.backends.triton.kernels.softmax import LOG2E, tanh


@triton.jit
def load_tile(
    x, described, b, first, head, block, low, high, batch_stride, row_stride, head_stride, column,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):
    """(BLOCK, DIM) of a head's rows block, block + 1, ... of a sequence that begins at row `first`,
    zeros outside of low..high and behind WIDTH columns. By a tensor descriptor of (batch entry,
    row, head, column), where there is one: then rows outside of low..high are what they are."""
    if described is not None:
        return described.load([b, block, head, column]).reshape(BLOCK, DIM)
    x += b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    return load_block(
        x, None, block, first, low, high, row_stride, 0, 0, column, WIDTH,
        ROWS, 1, BLOCK, DIM, WIDTH % DIM == 0, True,
    )


@triton.jit
def store_tile(
    x, row, head, nheads, exists, tile, column, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """The columns from `column` on of x (rows, nheads, WIDTH)."""
    columns = (column + tl.arange(0, DIM))[None, :]
    pointer = x + (row.to(tl.int64) * nheads + head)[:, None] * WIDTH + columns
    tl.store(pointer, tile.to(x.dtype.element_ty), mask=exists[:, None] & (columns < WIDTH))


@triton.jit
def viewers(position, rows, end, window_left, window_right, attention_chunk):
    """The interval of rows that see a key: both of its ends grow with the key."""
    begin = 0
    stop = rows
    diagonal = position + rows - end
    if window_left is not None:
        stop = tl.minimum(stop, diagonal + window_left + 1)
    if window_right is not None:
        begin = tl.maximum(begin, diagonal - window_right)
    if attention_chunk is not None:
        offset = position % attention_chunk
        begin = tl.maximum(begin, diagonal - offset)
        stop = tl.minimum(stop, diagonal - offset + attention_chunk)
    return begin, stop


@triton.jit
def viewers_of_block(
    block, rows, end, window_left, window_right, attention_chunk, BLOCK_N: tl.constexpr
):
    """(low, high, first, last): the keys low..high of a block that any row sees, and the rows
    first..last that see any of them."""
    low, _, high = range_of(0, rows - 1, rows, 0, end, window_left, window_right, attention_chunk)
    low = tl.maximum(low, block)
    high = tl.minimum(high, block + BLOCK_N)
    first, _ = viewers(low, rows, end, window_left, window_right, attention_chunk)
    _, last = viewers(high - 1, rows, end, window_left, window_right, attention_chunk)
    last = tl.where(low < high, last, first)
    return low, high, first, last


@triton.jit
def slope_of(alibi_slopes, b, head, batch_stride):
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * batch_stride + head)
    return slope


@triton.jit
def weights(
    scores, shift, token, position, rows, end, slope, scale, softcap, window_left, window_right,
    attention_chunk, TRANSFORMED: tl.constexpr,
):
    """P of a tile, and the tanh of capped scores, from the products of q and k. Its rows `token`
    and its keys `position` are vectors along its axes, in either order."""
    c = scale * LOG2E
    tanh_of_scores = scores
    if TRANSFORMED:
        c = LOG2E
        scores = scores * scale
        if softcap is not None:
            tanh_of_scores = tanh(scores / softcap)
            scores = tanh_of_scores * softcap
        if slope is not None:
            scores = scores - slope * tl.abs(token + end - rows - position).to(tl.float32)
    shift = tl.broadcast_to(shift, scores.shape)
    p = tl.exp2(tl.fma(scores, tl.full(scores.shape, c, tl.float32), shift))
    begin, stop = visible(token, rows, 0, end, window_left, window_right, attention_chunk)
    seen = position < tl.where(token < rows, stop, 0)
    if window_left is not None or attention_chunk is not None:
        seen = seen & (position >= begin)
    return tl.where(seen, p, 0.0), tanh_of_scores


@triton.jit
def gradients_of_scores(p, dp, delta, tanh_of_scores, softcap):
    """dS of a tile, but for softmax_scale."""
    ds = p * (dp - delta)
    if softcap is not None:
        one = tl.full(ds.shape, 1.0, tl.float32)
        ds = ds * tl.fma(-tanh_of_scores, tanh_of_scores, one)
    return ds


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "tiles", "work_items", "nheads",
])
def row_terms(
    dout, out, softmax_lse, dsoftmax_lse, shift, delta, cu_seqlens_q, seqused_q,
    batch_size, seqlen_q, total_q, tiles, work_items,
    dout_batch, dout_row, dout_head, out_batch, out_row, out_head, nheads,
    HEADDIM_V: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """What a row adds to the exponents of its weights, -softmax_lse * log2(e), and delta, both like
    softmax_lse; -inf and 0 for a row without weights.

    delta is the product that dP is, so that where a row sees one key, dP - delta is exactly 0.
    """
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        block = work % tiles * BLOCK_M
        head = work // tiles % nheads
        b = work // tiles // nheads
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        if block < rows:
            x = load_tile(
                dout, None, b, row, head, block, 0, rows, dout_batch, dout_row, dout_head, 0,
                HEADDIM_V, BLOCK_M, DIM_V,
            )
            y = load_tile(
                out, None, b, row, head, block, 0, rows, out_batch, out_row, out_head, 0,
                HEADDIM_V, BLOCK_M, DIM_V,
            )
            products = tl.dot(x, tl.trans(y), input_precision="ieee")
            i = tl.arange(0, BLOCK_M)
            sums = tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), 1)
            at = lse_at(b, row, block + i, head, nheads, seqlen_q, total_q, cu_seqlens_q)
            exists = block + i < rows
            if dsoftmax_lse is not None:
                sums -= tl.load(dsoftmax_lse + at, mask=exists, other=0.0)
            lse = tl.load(softmax_lse + at, mask=exists, other=0.0)
            silent = (lse == float("-inf")) | (lse == float("inf"))
            tl.store(shift + at, tl.where(silent, float("-inf"), -lse * LOG2E), mask=exists)
            tl.store(delta + at, tl.where(silent, 0.0, sums), mask=exists)


@triton.jit
def add_rows(
    k, k_rest, v, dk, dk_rest, dv, q, dout, q_described, q_rest_described, dout_described,
    shift, delta, b, row, head, block, first, last,
    rows, position, end, slope, scale, softcap, window_left, window_right, attention_chunk,
    q_batch, q_row, q_head, dout_batch, dout_row, dout_head,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, TRANSFORMED: tl.constexpr,
):
    """dk and dv of a block of keys after the rows block, block + 1, ... of one head."""
    token = block + tl.arange(0, BLOCK_M)
    known = tl.minimum(token, rows - 1)  # a mask would cost more
    q_tile = load_tile(
        q, q_described, b, row, head, block, first, last, q_batch, q_row, q_head, 0,
        HEADDIM, BLOCK_M, DIM,
    )
    scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
    if DIM_REST > 0:
        q_rest = load_tile(
            q, q_rest_described, b, row, head, block, first, last, q_batch, q_row, q_head, DIM,
            HEADDIM, BLOCK_M, DIM_REST,
        )
        scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision="ieee")
    p, tanh_of_scores = weights(
        scores, tl.load(shift + known)[None, :], token[None, :], position[:, None], rows, end,
        slope, scale, softcap, window_left, window_right, attention_chunk, TRANSFORMED,
    )
    dout_tile = load_tile(
        dout, dout_described, b, row, head, block, first, last, dout_batch, dout_row, dout_head, 0,
        HEADDIM_V, BLOCK_M, DIM_V,
    )
    dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
    delta_of_rows = tl.load(delta + known)[None, :]
    ds = gradients_of_scores(p, dp, delta_of_rows, tanh_of_scores, softcap).to(q_tile.dtype)
    dk = tl.dot(ds, q_tile, dk, input_precision="ieee")
    if DIM_REST > 0:
        dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision="ieee")
    return dk, dk_rest, dv


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "capacity", "tiles", "work_items", "softmax_scale",
    "softcap", "window_left", "window_right", "attention_chunk", "alibi_batch", "nheads_k",
])
def gradients_of_keys(
    q, k, v, dout, q_described, q_rest_described, dout_described, shift, delta, dk, dv,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes,
    batch_size, seqlen_q, total_q, capacity, tiles, work_items,
    softmax_scale, softcap, window_left, window_right, attention_chunk,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dout_batch, dout_row, dout_head, alibi_batch, nheads_k,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr,
    DIM_REST: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSFORMED: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    """Writes dk and dv of the keys that sequences have. The first keys, which most rows see where
    a mask is causal, come first."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        b, head_k, tile, _ = tile_of(work, batch_size, nheads_k, tiles, 1, NEIGHBOURS)
        block = (tiles - 1 - tile) * BLOCK_N
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        key, _, end = key_rows(b, capacity, cu_seqlens_k, seqused_k, None, None)
        if block < end:
            low, high, first, last = viewers_of_block(
                block, rows, end, window_left, window_right, attention_chunk, BLOCK_N
            )
            start = first // BLOCK_M * BLOCK_M
            blocks = (last - start + BLOCK_M - 1) // BLOCK_M
            blocks = tl.where(first < last, blocks, 0)
            k_tile = load_tile(
                k, None, b, key, head_k, block, low, high, k_batch, k_row, k_head, 0,
                HEADDIM, BLOCK_N, DIM,
            )
            v_tile = load_tile(
                v, None, b, key, head_k, block, low, high, v_batch, v_row, v_head, 0,
                HEADDIM_V, BLOCK_N, DIM_V,
            )
            dk_tile = tl.zeros([BLOCK_N, DIM], tl.float32)
            dv_tile = tl.zeros([BLOCK_N, DIM_V], tl.float32)
            k_rest = k_tile
            dk_rest = dk_tile
            if DIM_REST > 0:
                k_rest = load_tile(
                    k, None, b, key, head_k, block, low, high, k_batch, k_row, k_head, DIM,
                    HEADDIM, BLOCK_N, DIM_REST,
                )
                dk_rest = tl.zeros([BLOCK_N, DIM_REST], tl.float32)
            position = block + tl.arange(0, BLOCK_N)
            for i in range(0, blocks * GROUP):
                head = head_k * GROUP + i // blocks
                token = start + i % blocks * BLOCK_M
                at = lse_at(
                    b, row, 0, head, nheads_k * GROUP, seqlen_q, total_q, cu_seqlens_q
                )
                dk_tile, dk_rest, dv_tile = add_rows(
                    k_tile, k_rest, v_tile, dk_tile, dk_rest, dv_tile, q, dout,
                    q_described, q_rest_described, dout_described,
                    shift + at, delta + at, b, row, head, token, first, last, rows, position, end,
                    slope_of(alibi_slopes, b, head, alibi_batch), softmax_scale, softcap,
                    window_left, window_right, attention_chunk,
                    q_batch, q_row, q_head, dout_batch, dout_row, dout_head,
                    HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, BLOCK_M, TRANSFORMED,
                )
            at = first_row(b, key, capacity, cu_seqlens_k) + position
            exists = position < end
            store_tile(dv, at, head_k, nheads_k, exists, dv_tile, 0, HEADDIM_V, DIM_V)
            dk_tile = dk_tile * softmax_scale
            store_tile(dk, at, head_k, nheads_k, exists, dk_tile, 0, HEADDIM, DIM)
            if DIM_REST > 0:
                dk_rest = dk_rest * softmax_scale
                store_tile(dk, at, head_k, nheads_k, exists, dk_rest, DIM, HEADDIM, DIM_REST)


@triton.jit
def add_keys(
    q, q_rest, dout, dq, dq_rest, k, v, k_described, k_rest_described, v_described,
    shift, delta, b, key, head_k, block, low, high,
    token, rows, end, slope, scale, softcap, window_left, window_right, attention_chunk,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr, DIM_REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, TRANSFORMED: tl.constexpr,
):
    """dq of a block of rows after the keys block, block + 1, ..."""
    k_tile = load_tile(
        k, k_described, b, key, head_k, block, low, high, k_batch, k_row, k_head, 0,
        HEADDIM, BLOCK_N, DIM,
    )
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    if DIM_REST > 0:
        k_rest = load_tile(
            k, k_rest_described, b, key, head_k, block, low, high, k_batch, k_row, k_head, DIM,
            HEADDIM, BLOCK_N, DIM_REST,
        )
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    v_tile = load_tile(
        v, v_described, b, key, head_k, block, low, high, v_batch, v_row, v_head, 0,
        HEADDIM_V, BLOCK_N, DIM_V,
    )
    dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
    position = block + tl.arange(0, BLOCK_N)
    p, tanh_of_scores = weights(
        scores, shift[:, None], token[:, None], position[None, :], rows, end, slope, scale,
        softcap, window_left, window_right, attention_chunk, TRANSFORMED,
    )
    ds = gradients_of_scores(p, dp, delta[:, None], tanh_of_scores, softcap).to(k_tile.dtype)
    dq = tl.dot(ds, k_tile, dq, input_precision="ieee")
    if DIM_REST > 0:
        dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision="ieee")
    return dq, dq_rest


@triton.jit(do_not_specialize_on_alignment=LENGTHS, do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "capacity", "tiles", "work_items", "softmax_scale",
    "softcap", "window_left", "window_right", "attention_chunk", "alibi_batch", "nheads_k",
])
def gradients_of_rows(
    q, k, v, dout, k_described, k_rest_described, v_described, shift, delta, dq,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes,
    batch_size, seqlen_q, total_q, capacity, tiles, work_items,
    softmax_scale, softcap, window_left, window_right, attention_chunk,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dout_batch, dout_row, dout_head, alibi_batch, nheads_k,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, DIM: tl.constexpr,
    DIM_REST: tl.constexpr, DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSFORMED: tl.constexpr, NEIGHBOURS: tl.constexpr,
):
    """Writes dq of the rows that sequences have, tiles / GROUP blocks of each head."""
    for work in range(tl.program_id(0), work_items, tl.num_programs(0)):
        b, head_k, tile, _ = tile_of(work, batch_size, nheads_k, tiles, 1, NEIGHBOURS)
        head = head_k * GROUP + tile % GROUP
        start = tile // GROUP * BLOCK_M
        row, rows = query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q)
        key, _, end = key_rows(b, capacity, cu_seqlens_k, seqused_k, None, None)
        if start < rows:
            last = tl.minimum(start + BLOCK_M, rows) - 1
            low, _, high = range_of(
                start, last, rows, 0, end, window_left, window_right, attention_chunk
            )
            q_tile = load_tile(
                q, None, b, row, head, start, 0, rows, q_batch, q_row, q_head, 0,
                HEADDIM, BLOCK_M, DIM,
            )
            dout_tile = load_tile(
                dout, None, b, row, head, start, 0, rows, dout_batch, dout_row, dout_head, 0,
                HEADDIM_V, BLOCK_M, DIM_V,
            )
            dq_tile = tl.zeros([BLOCK_M, DIM], tl.float32)
            q_rest = q_tile
            dq_rest = dq_tile
            if DIM_REST > 0:
                q_rest = load_tile(
                    q, None, b, row, head, start, 0, rows, q_batch, q_row, q_head, DIM,
                    HEADDIM, BLOCK_M, DIM_REST,
                )
                dq_rest = tl.zeros([BLOCK_M, DIM_REST], tl.float32)
            token = start + tl.arange(0, BLOCK_M)
            exists = token < rows
            nheads = nheads_k * GROUP
            at = lse_at(b, row, token, head, nheads, seqlen_q, total_q, cu_seqlens_q)
            shift_of_rows = tl.load(shift + at, mask=exists, other=float("-inf"))
            delta_of_rows = tl.load(delta + at, mask=exists, other=0.0)
            slope = slope_of(alibi_slopes, b, head, alibi_batch)
            for block in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
                dq_tile, dq_rest = add_keys(
                    q_tile, q_rest, dout_tile, dq_tile, dq_rest, k, v,
                    k_described, k_rest_described, v_described, shift_of_rows, delta_of_rows,
                    b, key, head_k, block, low, high, token, rows, end, slope, softmax_scale,
                    softcap, window_left, window_right, attention_chunk,
                    k_batch, k_row, k_head, v_batch, v_row, v_head,
                    HEADDIM, HEADDIM_V, DIM, DIM_REST, DIM_V, BLOCK_N, TRANSFORMED,
                )
            at = first_row(b, row, seqlen_q, cu_seqlens_q) + token
            silent = (shift_of_rows == float("-inf"))[:, None]
            dq_tile = tl.where(silent, 0.0, dq_tile * softmax_scale)
            store_tile(dq, at, head, nheads, exists, dq_tile, 0, HEADDIM, DIM)
            if DIM_REST > 0:
                dq_rest = tl.where(silent, 0.0, dq_rest * softmax_scale)
                store_tile(dq, at, head, nheads, exists, dq_rest, DIM, HEADDIM, DIM_REST)
