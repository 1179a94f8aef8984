"""Where the rows and keys of a sequence lie, and which keys a row sees.

Keys are counted by their position in the sequence, from 0 on; a cache that has dropped old keys has
those from `first` on. What comes from a tensor is bounded by the tensors it leads into, since a
kernel can neither raise nor be trusted to stop at a mask.
"""

import triton
import triton.language as tl

# Arguments that are read number by number: where those of a batch's second half lie is no reason to
# compile a kernel anew.
LENGTHS = [
    *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
    *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "cache_start", "page_table"),
    *("rotary_seqlens", "slot_mapping"),
]


@triton.jit
def bounded(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def segment(cu_seqlens, b, total):
    """(first row, number of rows) of sequence b among `total` packed ones."""
    begin = bounded(tl.load(cu_seqlens + b), 0, total)
    return begin, bounded(tl.load(cu_seqlens + b + 1), begin, total) - begin


@triton.jit
def row_of(index, rows, batch_size, cu_seqlens):
    """(sequence, row in it, whether it has that) of the index-th row of a tensor that has so many
    rows, or so many of every sequence."""
    if cu_seqlens is None:
        b = index // rows
        row = index % rows
        exists = b < batch_size
    else:
        b = last_at_or_before(index, cu_seqlens, batch_size)
        begin, count = segment(cu_seqlens, b, rows)
        row = index - begin
        exists = (row >= 0) & (row < count)
    return b, row, exists


@triton.jit
def last_at_or_before(index, cu_seqlens, batch_size):
    """The last sequence that begins there, the first one if none does."""
    low = index * 0
    high = low + batch_size - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens + middle) <= index
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit
def query_rows(b, seqlen_q, total_q, cu_seqlens_q, seqused_q):
    """(first row in q's batch entry, number of rows that count) of sequence b."""
    begin = 0
    rows = seqlen_q
    if cu_seqlens_q is not None:
        begin, rows = segment(cu_seqlens_q, b, total_q)
        rows = tl.minimum(rows, seqlen_q)
    if seqused_q is not None:
        rows = bounded(tl.load(seqused_q + b), 0, rows)
    return begin, rows


@triton.jit
def key_rows(b, capacity, cu_seqlens_k, seqused_k, cache_leftpad, cache_start):
    """(row of position 0, first position, end of positions) of sequence b. Rows count from the
    start of a batch entry, of a row of the page table, or of packed k of `capacity` rows. Where old
    keys were dropped, position 0 lies before all rows."""
    begin = 0
    used = capacity
    if cu_seqlens_k is not None:
        begin, used = segment(cu_seqlens_k, b, capacity)
    if seqused_k is not None:
        used = bounded(tl.load(seqused_k + b), 0, used)
    pad = 0
    if cache_leftpad is not None:
        pad = bounded(tl.load(cache_leftpad + b), 0, used)
    first = 0
    if cache_start is not None:
        first = tl.maximum(tl.load(cache_start + b), 0)
    return begin + pad - first, first, first + used - pad


@triton.jit
def visible(token, seqlen_q, first, end, window_left, window_right, attention_chunk):
    """The interval of positions that a row sees: every mask is one, aligned to the bottom right,
    and both of its ends grow with the row."""
    diagonal = token + end - seqlen_q
    begin = diagonal * 0 + first
    stop = diagonal * 0 + end
    if window_left is not None:
        begin = tl.maximum(begin, diagonal - window_left)
    if window_right is not None:
        stop = tl.minimum(stop, diagonal + window_right + 1)
    if attention_chunk is not None:
        offset = (diagonal % attention_chunk + attention_chunk) % attention_chunk
        begin = tl.maximum(begin, diagonal - offset)
        stop = tl.minimum(stop, diagonal - offset + attention_chunk)
    return begin, stop


@triton.jit
def range_of(
    token, last_token, rows, first, end, window_left, window_right, attention_chunk
):  # fmt: skip
    """(low, full, high): the positions low..high that any of these rows of q sees, of which all
    rows see those before `full` where none has a lower limit."""
    last_token = tl.minimum(last_token, rows - 1)
    low, full = visible(token, rows, first, end, window_left, window_right, attention_chunk)
    _, high = visible(last_token, rows, first, end, window_left, window_right, attention_chunk)
    low = tl.maximum(low, 0)
    high = tl.where(token < rows, high, low)
    return low, tl.minimum(full, high), high
