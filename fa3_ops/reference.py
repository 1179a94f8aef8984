"""The meaning of every argument, in float64 and plain PyTorch.

Slow on purpose: one sequence and one head at a time, the whole score matrix in memory. The kernels
are tested against this file, and gradients against autograd through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_ops.ops.checks import NARROW


def mask(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_size: Sequence[int],
    attention_chunk: int,
    start: int = 0,
) -> Tensor:
    """(seqlen_q, seqlen_k), true where query i sees key j. Aligned to the bottom right: the last
    query stands at the last key, the first key at position `start` of its sequence."""
    left, right = window_size
    if causal:
        right = 0
    i = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k)[None, :]
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    if attention_chunk > 0:
        first = i - (i + start) % attention_chunk
        seen &= (first <= j) & (j < first + attention_chunk)
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    start: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (seqlen_q, nheads, headdim), k (seqlen_k, nheads_k, headdim), v (seqlen_k,
    nheads_k, headdim_v), qv like q with headdim_v, alibi_slopes and sinks (nheads,).
    Returns out (seqlen_q, nheads, headdim_v) and softmax_lse (nheads, seqlen_q), natural log."""
    seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k, headdim_v = v.shape
    if softmax_scale is None:
        softmax_scale = (headdim + (0 if qv is None else headdim_v)) ** -0.5
    seen = mask(seqlen_q, seqlen_k, causal, window_size, attention_chunk, start)
    i = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    distance = (i - torch.arange(seqlen_k)[None, :]).abs()

    outs, lses = [], []
    for head in range(nheads):
        head_k = head * nheads_k // nheads
        values = v[:, head_k].double()
        scores = q[:, head].double() @ k[:, head_k].double().T
        if qv is not None:
            scores = scores + qv[:, head].double() @ values.T
        scores = scores * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[head].double() * distance
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:  # one more key, without a value
            sink = sinks[head].double().expand(seqlen_q, 1)
            lse = torch.logsumexp(torch.cat([scores, sink], 1), 1)
        else:
            lse = torch.logsumexp(scores, 1)
        blind = ~seen.any(1)  # sees no key: out is 0, softmax_lse is -inf, sink or not
        lse = lse.masked_fill(blind, float("-inf"))
        weights = torch.exp(scores - lse.masked_fill(blind, 0.0)[:, None])
        outs.append(weights.masked_fill(~seen, 0.0) @ values.masked_fill(~seen.any(0)[:, None], 0))
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses)


def rotate(
    x: Tensor, rotary_cos: Tensor, rotary_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """x (seqlen, nheads, headdim), row i rotated by the angle of positions[i]; rotary_cos and
    rotary_sin (seqlen_ro, rotary_dim / 2). The result is rounded to x's dtype."""
    half = rotary_cos.shape[1]
    cos, sin = (t[positions.long()].double()[:, None] for t in (rotary_cos, rotary_sin))
    y = x.double().clone()
    if interleaved:
        even, odd = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        even, odd = slice(0, half), slice(half, 2 * half)
    a, b = x[..., even].double(), x[..., odd].double()
    y[..., even] = a * cos - b * sin
    y[..., odd] = a * sin + b * cos
    return y.to(x.dtype)


def narrowed(x: Tensor, dtype: torch.dtype, descale: Tensor | None = None) -> Tensor:
    """x (..., nheads_k, d) as a cache of a narrow dtype holds it: divided in float32 by descale,
    which is broadcast over (..., nheads_k), then the nearest number of the dtype, ties to even,
    found among all of them. NaN stays NaN, and is 0 in int8."""
    if x.dtype == dtype:
        return x
    x = x.float() if descale is None else x.float() / descale[..., None]
    codes = torch.arange(-128, 128, dtype=torch.int8)
    numbers = codes.view(dtype).double()
    numbers, codes = numbers[numbers.isfinite()], codes[numbers.isfinite()]
    numbers, order = numbers.sort(stable=True)
    codes = codes[order]
    above = torch.searchsorted(numbers, x.double().contiguous()).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    even = codes[above] % 2 == 0
    nearest = torch.where((x > middle) | ((x == middle) & even), above, above - 1)
    if dtype == torch.int8:
        return codes[nearest].masked_fill(x.isnan(), 0)
    y = codes[nearest].view(dtype).float()
    y = torch.where(y == 0, torch.zeros_like(y).copysign(x), y)  # there are two zeros
    return torch.where(x.isnan(), x, y).to(dtype)


def scatter(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """kvcache_scatter_, one row after another."""
    for i, slot in enumerate(slot_mapping.tolist()):
        at = slot // k_cache.shape[1], slot % k_cache.shape[1]
        if slot >= 0:
            k_cache[at] = narrowed(k[i], k_cache.dtype, k_descale)
            v_cache[at] = narrowed(v[i], v_cache.dtype, v_descale)


def _descaled(x: Tensor, descale: Tensor | None, b: int) -> Tensor:
    """Rows (seqlen, nheads, d) of an 8-bit dtype times descale, (batch_size, nheads_k),
    (nheads_k,) or one number; other dtypes ignore descales."""
    if x.dtype not in NARROW:
        return x
    x = x.double()
    if descale is None:
        return x
    factors = (descale[b] if descale.dim() == 2 else descale.reshape(-1)).double()
    return x * factors.repeat_interleave(x.shape[1] // len(factors))[:, None]


def batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cache_start: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **arguments: object,
) -> tuple[Tensor, Tensor]:
    """Every layout: q dense (batch_size, seqlen_q, ...) or packed by cu_seqlens_q; k and v dense,
    packed by cu_seqlens_k (or by seqused_k, one sequence behind the other), or paged. k and v have
    q's dtype or a narrow one. Rows of q that no sequence uses give 0 and -inf."""
    if k.dim() == 3 and cu_seqlens_k is None and seqused_k is not None:
        cu_seqlens_k = torch.tensor([0, *seqused_k.cumsum(0).tolist()])
        seqused_k = None
    batch_size = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    *batch, rows, nheads, _ = q.shape
    softmax_lse = torch.full((*batch, nheads, rows), float("-inf"), dtype=torch.float64)
    for b in range(batch_size):
        if cu_seqlens_q is None:
            at, seqlen_q = 0, q.shape[1]
            q_rows, qv_rows = q[b], None if qv is None else qv[b]
            out_rows, lse_rows = out[b], softmax_lse[b]
        else:
            at, seqlen_q = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1] - cu_seqlens_q[b])
            q_rows, qv_rows, out_rows, lse_rows = q, qv, out, softmax_lse
        if seqused_q is not None:
            seqlen_q = int(seqused_q[b])
        rows_q = slice(at, at + seqlen_q)

        entry = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if cu_seqlens_k is not None:
            segment = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
            keys, values = k[segment], v[segment]
        elif page_table is not None:
            # Entries of pages that no row sees may hold anything.
            pages = page_table[entry].long().clamp(0, k.shape[0] - 1)
            keys, values = (x[pages].flatten(0, 1) for x in (k, v))
        else:
            keys, values = k[entry], v[entry]
        seqlen_k = len(keys) if seqused_k is None else int(seqused_k[b])
        first = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = keys[first:seqlen_k], values[first:seqlen_k]

        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        o, lse = attention(
            _descaled(q_rows[rows_q], q_descale, b),
            _descaled(keys, k_descale, b),
            _descaled(values, v_descale, b),
            qv=None if qv_rows is None else _descaled(qv_rows[rows_q], q_descale, b),
            alibi_slopes=slopes,
            start=0 if cache_start is None else int(cache_start[b]),
            **arguments,  # type: ignore[arg-type]
        )
        out_rows[rows_q] = o
        lse_rows[..., rows_q] = lse
    return out, softmax_lse


def _of_sequence(descale: Tensor | None, b: int) -> Tensor | None:
    """Of descales by sequence and head, by head, or one for all."""
    return descale[b] if descale is not None and descale.dim() == 2 else descale


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Writes row i of sequence b at position cache_seqlens[b] + i of its cache, rotated at
    rotary_seqlens[b] + i (by default the same position, left padding counted)."""
    for b in range(len(cache_seqlens)):
        if cu_seqlens_k_new is None:
            keys, values = k[b], v[b]
        else:
            segment = slice(int(cu_seqlens_k_new[b]), int(cu_seqlens_k_new[b + 1]))
            keys, values = k[segment], v[segment]
        positions = int(cache_seqlens[b]) + torch.arange(len(keys))
        if rotary_cos is not None and rotary_sin is not None:
            first = cache_seqlens if rotary_seqlens is None else rotary_seqlens
            at = int(first[b]) + torch.arange(len(keys))
            keys = rotate(keys, rotary_cos, rotary_sin, at, rotary_interleaved)
        keys = narrowed(keys, k_cache.dtype, _of_sequence(k_descale, b))
        values = narrowed(values, v_cache.dtype, _of_sequence(v_descale, b))
        entry = b if cache_batch_idx is None else int(cache_batch_idx[b])
        if page_table is None:
            k_cache[entry, positions], v_cache[entry, positions] = keys, values
        else:
            page_size = k_cache.shape[1]
            pages = page_table[entry].long()[positions // page_size]
            k_cache[pages, positions % page_size] = keys
            v_cache[pages, positions % page_size] = values


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_start: Tensor | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **arguments: object,
) -> tuple[Tensor, Tensor]:
    """Appends k and v to the caches (in place), rotates, attends."""
    if k is not None and v is not None and cache_seqlens is not None:
        if rotary_seqlens is None and cache_start is not None:
            rotary_seqlens = cache_seqlens + cache_start
        if rotary_cos is not None and rotary_sin is not None:
            # Without a causal or local mask every row of q stands at the first new position.
            local = causal or max(window_size) >= 0 or attention_chunk > 0
            first = cache_seqlens if rotary_seqlens is None else rotary_seqlens
            q = q.clone()
            for b in range(len(cache_seqlens)):
                if cu_seqlens_q is None:
                    rows = q[b]
                else:
                    rows = q[int(cu_seqlens_q[b]) : int(cu_seqlens_q[b + 1])]
                at = int(first[b]) + torch.arange(len(rows)) * int(local)
                rows.copy_(rotate(rows, rotary_cos, rotary_sin, at, rotary_interleaved))
        append(
            k,
            v,
            k_cache,
            v_cache,
            cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            page_table=page_table,
            cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_seqlens=rotary_seqlens,
            rotary_interleaved=rotary_interleaved,
            k_descale=k_descale,
            v_descale=v_descale,
        )
        new = k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff()
        cache_seqlens = cache_seqlens + new
    return batched(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        page_table=page_table,
        cache_start=cache_start,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        k_descale=k_descale,
        v_descale=v_descale,
        **arguments,  # type: ignore[arg-type]
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    out = torch.einsum("...k,nk->...n", x.double(), weight.double())
    return out if bias is None else out + bias.double()
