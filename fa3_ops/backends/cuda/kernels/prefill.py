"""Prefill on Hopper: the sums of triton/kernels/attention.py in the same order, so the same bits.

One warp copies q, k and v by descriptors; two warpgroups take 64 rows of a tile each. A block's
product of q and k runs beside the product of weights and v of the block before: a stage of shared
memory has these two. What limits it are the instructions of the softmax, of which a warp waits for
one after the other: docs/cuda.md has a profile.
"""
# fmt: off

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NONE = gl.constexpr(-1.0e30)  # as triton/kernels/softmax.py has these
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
UNIT = gl.constexpr(2.0**-22)
ROWS = gl.constexpr(64)  # of a warpgroup
WARPGROUPS = gl.constexpr(2)


@gluon.jit
def tile_of(
    work, q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q, capacity, nheads_k, tiles,
    NEIGHBOURS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED_Q: gl.constexpr, PACKED_K: gl.constexpr, USED_K: gl.constexpr,
):
    """(KV head, sequence, first token, row of q, rows, row of k, keys, blocks, blocks that all rows
    see) of a work item; no blocks where there are no rows."""
    before = work // (NEIGHBOURS * tiles) * NEIGHBOURS
    at = work % (NEIGHBOURS * tiles)
    size = gl.minimum(NEIGHBOURS, batch_size * nheads_k - before)
    pair = before + at % size
    b = pair // nheads_k
    token = (tiles - 1 - at // size) * (WARPGROUPS * ROWS // GROUP)
    q_begin = 0
    rows = seqlen_q
    if PACKED_Q:
        q_begin = gl.maximum(gl.minimum(gl.load(q_begins + b), total_q), 0)
        rows = gl.minimum(gl.load(q_begins + b + 1), total_q) - q_begin
        rows = gl.minimum(rows, seqlen_q)
    k_begin = 0
    keys = capacity
    if PACKED_K:
        k_begin = gl.load(k_begins + b)
        keys = gl.load(k_begins + b + 1) - k_begin
    if USED_K:
        keys = gl.maximum(gl.minimum(gl.load(seqused_k + b), keys), 0)
    high = keys
    full = keys
    if CAUSAL:
        high = gl.minimum(keys, keys - rows + token + WARPGROUPS * ROWS // GROUP)
        full = gl.minimum(keys, keys - rows + token + 1)
    high = gl.where(token < rows, high, 0)
    blocks = gl.maximum(high + BLOCK_N - 1, 0) // BLOCK_N
    full = gl.maximum(full, 0) // BLOCK_N
    return pair % nheads_k, b, token, q_begin, rows, k_begin, keys, blocks, full


@gluon.jit
def place_of(n, STAGES: gl.constexpr):
    """(stage, phase of its barriers) of a program's n-th block of k."""
    return n & (STAGES - 1), ((n & STAGES) != 0).to(gl.int32)


@gluon.jit
def row_max(x, SCORES: gl.constexpr):
    """The greatest of every row, by a tree: a chain of its numbers would be waited for."""
    a, b = gl.split(x.reshape([ROWS, x.shape[1] // 2, 2]))
    for _ in gl.static_range(2):
        a, b = gl.split(gl.maximum(a, b).reshape([ROWS, 2, a.shape[1] // 2]).permute((0, 2, 1)))
    x = gl.maximum(a, b)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, SCORES), assert_trivial=True)


@gluon.jit
def await_filled(filled, n, STAGES: gl.constexpr):
    stage, phase = place_of(n, STAGES)
    mbarrier.wait(filled.index(stage), phase)


@gluon.jit
def weights(scores, m, total, c, SCORES: gl.constexpr):
    greatest = gl.maximum(m, row_max(scores, SCORES))
    zero = gl.full(scores.shape, 0.0, gl.float32, layout=SCORES)
    p = gl.exp2(gl.fma(scores, zero + c, (-greatest * c)[:, None] + zero))
    alpha = gl.exp2((m - greatest) * c)
    units = (p + 2.0).to(gl.int32, bitcast=True)  # four times the bits of 2 are 0
    total = gl.fma(total, alpha, gl.sum(units, 1).to(gl.float32) * UNIT)
    return p, greatest, total, alpha


@gluon.jit
def merge(m, total, acc, m_next, total_next, acc_next, c, SUMS: gl.constexpr):
    greatest = gl.maximum(m, m_next)
    a = gl.exp2((m - greatest) * c)
    b = gl.exp2((m_next - greatest) * c)
    zero = gl.full(acc.shape, 0.0, gl.float32, layout=SUMS)
    of_rows: gl.constexpr = gl.SliceLayout(1, SUMS)
    of_acc = gl.convert_layout(a, of_rows)[:, None] + zero
    acc = gl.fma(acc, of_acc, acc_next * gl.convert_layout(b, of_rows)[:, None])
    return greatest, gl.fma(total, a, total_next * b), acc


@gluon.jit
def as_matrix(buffer, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return buffer._reinterpret(buffer.dtype, [BLOCK_N, DIM], layout)


@gluon.jit
def scores_of(q, k_buffer, BLOCK_N: gl.constexpr, DIM: gl.constexpr, SCORES: gl.constexpr):
    zero = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=SCORES)
    keys = as_matrix(k_buffer, BLOCK_N, DIM).permute((1, 0))
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def clear_behind(v_buffer, first, BLOCK_N: gl.constexpr, DIM: gl.constexpr):
    """Zeros in rows of v from `first` on: what lies behind a sequence may be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    values = as_matrix(v_buffer, BLOCK_N, DIM)
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    x = values.load(layout)
    values.store(gl.where((row < first)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.constexpr_function
def sums_layout(dim):
    """Of acc in shared memory: a thread's numbers 4 by 4 beside its neighbours', as registers hold
    them, so that no two threads of a warp want one bank."""
    vector, lanes = [(0, 1), (8, 0)], [(0, 2), (0, 4), (1, 0), (2, 0), (4, 0)]
    columns = [(0, 1 << bit) for bit in range(3, dim.bit_length() - 1)]
    bases = [*vector, *lanes, *columns, (16, 0), (32, 0)]
    return gl.SharedLinearLayout([list(base) for base in bases])


@gluon.jit
def step(
    j, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers, filled, emptied,
    last_seen, c,
    BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
    NEW_CHUNK: gl.constexpr, MASKED: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):
    """Scores and weights of block j, and the values of the block before it. What acc is after the
    last block of a chunk is forgotten."""
    stage, _ = place_of(at + j, STAGES)
    pending_scores = scores_of(q, k_buffers.index(stage), BLOCK_N, DIM, SCORES)
    values = as_matrix(v_buffers.index(stage), BLOCK_N, DIM)
    old = (j - 1) % BLOCKS != 0
    pending = warpgroup_mma(p, values, acc, use_acc=old, is_async=True)
    await_filled(filled, at + j + 1, STAGES)
    scores = warpgroup_mma_wait(1, deps=[pending_scores])
    if MASKED:
        key = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(key[None, :] <= last_seen[:, None], scores, float("-inf"))
    if NEW_CHUNK:
        m_before = m
        total_before = total
        m = gl.full([ROWS], NONE, gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    weight, m, total, alpha = weights(scores, m, total, c, SCORES)
    acc = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(emptied.index(stage), count=1)
    if NEW_CHUNK:
        m_all, total_all, acc = merge(
            m_all, total_all, acc_all.load(SUMS), m_before, total_before, acc, c, SUMS
        )
        acc_all.store(acc)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    p = gl.convert_layout(weight.to(q.dtype), WEIGHTS)
    return p, m, total, acc, m_all, total_all


@gluon.jit
def consume(
    sums, q_buffers, k_buffers, v_buffers, q_full, q_empty, filled, emptied,
    out, softmax_lse, q_begins, k_begins, seqused_k,
    batch_size, seqlen_q, total_q, capacity, nheads_k, tiles, work_items, c,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, CHUNK: gl.constexpr, NEIGHBOURS: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED_Q: gl.constexpr, PACKED_K: gl.constexpr, USED_K: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    BLOCKS: gl.constexpr = CHUNK // BLOCK_N
    acc_all = sums.index(WHICH)
    at = 0
    round = 0
    for work in range(gl.program_id(0), work_items, gl.num_programs(0)):
        head_k, b, token, q_begin, rows, k_begin, keys, blocks, full = tile_of(
            work, q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q, capacity,
            nheads_k, tiles, NEIGHBOURS, GROUP, BLOCK_N, CAUSAL, PACKED_Q, PACKED_K, USED_K,
        )
        m = gl.full([ROWS], NONE, gl.float32, layout=OF_ROWS)
        total = gl.full([ROWS], 0.0, gl.float32, layout=OF_ROWS)
        acc = gl.full([ROWS, DIM], 0.0, gl.float32, layout=SUMS)
        m_all = m
        total_all = total
        acc_all.store(acc)
        own = token + (WHICH * ROWS + gl.arange(0, ROWS, layout=OF_ROWS)) // GROUP
        last_seen = keys - 1 + own * 0
        if CAUSAL:
            last_seen = gl.minimum(keys - rows + own, keys - 1)
        if blocks > 0:
            mbarrier.wait(q_full, round & 1)
            q = as_matrix(q_buffers.index(WHICH), ROWS, DIM).load(gl.DotOperandLayout(0, SCORES, 2))
            mbarrier.arrive(q_empty, count=1)
            await_filled(filled, at, STAGES)
            stage, _ = place_of(at, STAGES)
            pending = scores_of(q, k_buffers.index(stage), BLOCK_N, DIM, SCORES)
            await_filled(filled, at + 1, STAGES)
            scores = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(emptied.index(stage), count=1)
            key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
            scores = gl.where(key[None, :] <= last_seen[:, None], scores, float("-inf"))
            weight, m, total, alpha = weights(scores, m, total, c, SCORES)
            p = gl.convert_layout(weight.to(q.dtype), WEIGHTS)
            for j in range(1, gl.minimum(BLOCKS, full)):
                p, m, total, acc, m_all, total_all = step(
                    j, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers,
                    filled, emptied, last_seen, c,
                    BLOCK_N, DIM, STAGES, BLOCKS, False, False, SCORES, SUMS, WEIGHTS,
                )
            for begin in range(BLOCKS, full, BLOCKS):
                p, m, total, acc, m_all, total_all = step(
                    begin, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers,
                    filled, emptied, last_seen, c,
                    BLOCK_N, DIM, STAGES, BLOCKS, True, False, SCORES, SUMS, WEIGHTS,
                )
                for j in range(begin + 1, gl.minimum(begin + BLOCKS, full)):
                    p, m, total, acc, m_all, total_all = step(
                        j, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers,
                        filled, emptied, last_seen, c,
                        BLOCK_N, DIM, STAGES, BLOCKS, False, False, SCORES, SUMS, WEIGHTS,
                    )
            for j in range(gl.maximum(full, 1), blocks):
                if j % BLOCKS == 0:
                    p, m, total, acc, m_all, total_all = step(
                        j, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers,
                        filled, emptied, last_seen, c,
                        BLOCK_N, DIM, STAGES, BLOCKS, True, True, SCORES, SUMS, WEIGHTS,
                    )
                else:
                    p, m, total, acc, m_all, total_all = step(
                        j, at, q, p, m, total, acc, m_all, total_all, acc_all, k_buffers, v_buffers,
                        filled, emptied, last_seen, c,
                        BLOCK_N, DIM, STAGES, BLOCKS, False, True, SCORES, SUMS, WEIGHTS,
                    )
            last, _ = place_of(at + blocks, STAGES)
            if keys < blocks * BLOCK_N:
                clear_behind(v_buffers.index(last), keys - (blocks - 1) * BLOCK_N, BLOCK_N, DIM)
            values = as_matrix(v_buffers.index(last), BLOCK_N, DIM)
            old = (blocks - 1) % BLOCKS != 0
            pending = warpgroup_mma(p, values, acc, use_acc=old, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(emptied.index(last), count=1)
            round += 1
            at += blocks + 1
        m, total, acc = merge(m_all, total_all, acc_all.load(SUMS), m, total, acc, c, SUMS)
        store(
            out, softmax_lse, m, total, acc, c, b, q_begin, rows, token, head_k, seqlen_q, total_q,
            nheads_k, not PACKED_Q, WHICH, GROUP, DIM, SCORES, SUMS,
        )


@gluon.jit
def store(
    out, softmax_lse, m, total, acc, c, b, q_begin, rows, token, head_k, seqlen_q, total_q,
    nheads_k, DENSE: gl.constexpr, WHICH: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):
    nheads = nheads_k * GROUP
    row0 = q_begin
    if DENSE:
        row0 = b * seqlen_q
    blind = total == 0
    total = gl.where(blind, 1.0, total)
    scale = gl.convert_layout(gl.where(blind, 0.0, 1.0 / total), gl.SliceLayout(1, SUMS))
    in_tile = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    own = token + in_tile // GROUP
    head = head_k * GROUP + in_tile % GROUP
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, SUMS))
    offset = ((row0 + own).to(gl.int64) * nheads + head) * DIM
    x = (acc * scale[:, None]).to(out.dtype.element_ty)
    gl.store(out + offset[:, None] + column[None, :], x, mask=(own < rows)[:, None])
    nan = gl.convert_layout(gl.min((acc != acc).to(gl.int32), 1), gl.SliceLayout(1, SCORES)) == 1
    lse = gl.fma(m * c, LN2 + gl.zeros_like(m), gl.log(total))
    lse = gl.where(nan, float("nan"), gl.where(blind, float("-inf"), lse))
    in_tile = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    own = token + in_tile // GROUP
    head = head_k * GROUP + in_tile % GROUP
    place = head.to(gl.int64) * total_q + q_begin + own
    if DENSE:
        place = (b.to(gl.int64) * nheads + head) * seqlen_q + own
    gl.store(softmax_lse + place, lse, mask=own < rows)


@gluon.jit
def produce(
    q, k, v, pages, table_row, q_buffers, k_buffers, v_buffers, q_full, q_empty, filled, emptied,
    q_begins, k_begins, seqused_k,
    batch_size, seqlen_q, total_q, capacity, num_pages, nheads_k, tiles, work_items,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr, NEIGHBOURS: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED_Q: gl.constexpr, PACKED_K: gl.constexpr, USED_K: gl.constexpr,
):
    """A stage gets a block of k and the block of v before it, which are wanted together."""
    at = 0
    round = 0
    for work in range(gl.program_id(0), work_items, gl.num_programs(0)):
        head_k, b, token, q_begin, rows, k_begin, keys, blocks, full = tile_of(
            work, q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q, capacity,
            nheads_k, tiles, NEIGHBOURS, GROUP, BLOCK_N, CAUSAL, PACKED_Q, PACKED_K, USED_K,
        )
        entry = b
        if PACKED_K:
            entry = 0
        q_entry = b
        if PACKED_Q:
            q_entry = 0
        entry_before = entry
        row_before = 0
        if blocks > 0:
            mbarrier.wait(q_empty, (round & 1) ^ 1)
            mbarrier.expect(q_full, WARPGROUPS * ROWS * DIM * 2)
            for i in gl.static_range(WARPGROUPS):
                place = [q_entry, q_begin + token + i * (ROWS // GROUP), head_k * GROUP, 0]
                tma.async_copy_global_to_shared(q, place, q_full, q_buffers.index(i))
            round += 1
            for j in range(blocks + 1):
                row = k_begin + j * BLOCK_N
                if PAGE_SIZE > 0:
                    column = gl.minimum(j, blocks - 1) * BLOCK_N // PAGE_SIZE
                    page = gl.load(pages + b.to(gl.int64) * table_row + column)
                    entry = gl.minimum(gl.maximum(page, 0), num_pages - 1)
                    row = j * BLOCK_N % PAGE_SIZE
                stage, phase = place_of(at + j, STAGES)
                mbarrier.wait(emptied.index(stage), phase ^ 1)
                both = (j > 0) & (j < blocks)
                mbarrier.expect(filled.index(stage), 2 * BLOCK_N * DIM * 2, pred=both)
                mbarrier.expect(filled.index(stage), BLOCK_N * DIM * 2, pred=both ^ True)
                tma.async_copy_global_to_shared(
                    k, [entry, row, head_k, 0], filled.index(stage), k_buffers.index(stage),
                    pred=j < blocks,
                )
                tma.async_copy_global_to_shared(
                    v, [entry_before, row_before, head_k, 0], filled.index(stage),
                    v_buffers.index(stage), pred=j > 0,
                )
                entry_before = entry
                row_before = row
            at += blocks + 1


@gluon.jit(do_not_specialize=[
    "batch_size", "seqlen_q", "total_q", "capacity", "num_pages", "tiles", "work_items",
    "table_row",
])
def prefill(
    q, k, v, out, softmax_lse, pages, q_begins, k_begins, seqused_k,
    batch_size, seqlen_q, total_q, capacity, num_pages, tiles, work_items, softmax_scale, table_row,
    nheads_k, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, CHUNK: gl.constexpr,
    PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr, NEIGHBOURS: gl.constexpr, STAGES: gl.constexpr,
    PACKED_Q: gl.constexpr, PACKED_K: gl.constexpr, USED_K: gl.constexpr,
):
    """Tensors that USED_K, PACKED_Q, PACKED_K or a PAGE_SIZE of 0 make needless may be any."""
    dtype: gl.constexpr = q.dtype
    q_shape: gl.constexpr = [WARPGROUPS, 1, ROWS // GROUP, GROUP, DIM]
    q_buffers = gl.allocate_shared_memory(dtype, q_shape, q.layout)
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, DIM], k.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, DIM], v.layout)
    sums = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, ROWS, DIM], sums_layout(DIM))
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=WARPGROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=WARPGROUPS)
    fence_async_shared()
    c = softmax_scale * LOG2E
    gl.warp_specialize([
        (consume, (
            sums, q_buffers, k_buffers, v_buffers, q_full, q_empty, filled, emptied,
            out, softmax_lse, q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q,
            capacity, nheads_k, tiles, work_items, c, 0,
            GROUP, BLOCK_N, DIM, STAGES, CHUNK, NEIGHBOURS, CAUSAL, PACKED_Q, PACKED_K, USED_K,
        )),
        (consume, (
            sums, q_buffers, k_buffers, v_buffers, q_full, q_empty, filled, emptied,
            out, softmax_lse, q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q,
            capacity, nheads_k, tiles, work_items, c, 1,
            GROUP, BLOCK_N, DIM, STAGES, CHUNK, NEIGHBOURS, CAUSAL, PACKED_Q, PACKED_K, USED_K,
        )),
        (produce, (
            q, k, v, pages, table_row,
            q_buffers, k_buffers, v_buffers, q_full, q_empty, filled, emptied,
            q_begins, k_begins, seqused_k, batch_size, seqlen_q, total_q, capacity, num_pages,
            nheads_k, tiles, work_items,
            GROUP, BLOCK_N, DIM, STAGES, PAGE_SIZE, NEIGHBOURS, CAUSAL, PACKED_Q, PACKED_K, USED_K,
        )),
    ], [4, 1], [240, 24])
