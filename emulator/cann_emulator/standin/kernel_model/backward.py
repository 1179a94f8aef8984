"""The backward of flash_attn_npu for Ascend 910: host and kernel."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import Tensor

from .host import check, named
from .memory import Memory, guarded, launch

BACKWARD = """dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k seqused_q seqused_k
max_seqlen_q max_seqlen_k softmax_scale causal window_left window_right softcap deterministic
sm_margin"""

ROWS, COLUMNS = 16, 128  # of a block, whose contribution is added as one
_calls = itertools.count()


def named_gradients(*args: object) -> SimpleNamespace:
    """The arguments by name, with fresh dq, dk, dv where none were given."""
    a = named(BACKWARD, args)
    for grad, x in (("dq", a.q), ("dk", a.k), ("dv", a.v)):
        if getattr(a, grad) is None:
            setattr(a, grad, torch.empty_like(x))
    check(a.q.dtype in (torch.float16, torch.bfloat16), "mha_bwd only supports FP16 and BF16")
    dtypes = {x.dtype for x in (a.q, a.k, a.v, a.out, a.dout, a.dq, a.dk, a.dv)}
    check(len(dtypes) == 1, "mha_bwd: dtypes must be the same")
    check(a.softcap >= 0, "softcap must be non-negative (0.0 disables softcap)")
    check(a.seqused_q is None, "mha_bwd does not support seqused_q yet.")
    check(a.seqused_k is None, "mha_bwd does not support seqused_k yet.")
    check(a.sm_margin == 0, "mha_bwd does not support sm_margin yet.")
    check(a.q.shape[-2] % a.k.shape[-2] == 0, "mha_bwd: key/value heads must divide query heads")
    check(a.q.shape[-1] == a.k.shape[-1], "mha_bwd: q and k must share the same headdim")
    check(0 < a.q.shape[-1] <= 256, "mha_bwd: headdim must be in (0, 256].")
    a.varlen = a.cu_seqlens_q is not None
    needed = (a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
    check(not a.varlen or None not in needed, "mha_bwd needs cu_seqlens_k and both max_seqlen")
    if not a.varlen:
        a.max_seqlen_q, a.max_seqlen_k = a.q.shape[1], a.k.shape[1]
    a.scale = a.q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    return a


@guarded(1)
def backward(*args: object) -> list[Tensor]:
    """mha_bwd of 0.4.2.post1. Every tensor is addressed from the start of its storage."""
    a = named_gradients(*args)
    batch = a.cu_seqlens_q.shape[0] - 1 if a.varlen else a.q.shape[0]
    heads = a.q.shape[-2]
    rank = 3 if a.varlen else 4
    check(all(x.dim() == rank for x in (a.q, a.k, a.v, a.out, a.dout)), "mha_bwd: wrong rank")
    check(a.q.shape == a.out.shape == a.dout.shape == a.dq.shape, "mha_bwd: shapes must be of q")
    check(a.k.shape == a.v.shape == a.dk.shape == a.dv.shape, "mha_bwd: shapes must be of k")
    check(a.varlen or a.q.shape[0] == a.k.shape[0], "mha_bwd: batch sizes differ")
    check(min(batch, a.max_seqlen_q, a.max_seqlen_k) > 0, "mha_bwd: lengths must be positive")
    lse_shape = (heads, a.q.shape[0]) if a.varlen else (batch, heads, a.max_seqlen_q)
    check(a.softmax_lse.shape == lse_shape, f"mha_bwd: softmax_lse must be {lse_shape}")

    left = -1 if a.window_left >= a.max_seqlen_k - 1 else a.window_left
    right = -1 if a.window_right >= a.max_seqlen_q - 1 else a.window_right
    if a.varlen:
        ends = [[0, *x.cpu()[1:].tolist()] for x in (a.cu_seqlens_q, a.cu_seqlens_k)]
    else:
        ends = [[n * i for i in range(batch + 1)] for n in (a.max_seqlen_q, a.max_seqlen_k)]
    a.softmax_lse = a.softmax_lse.contiguous()
    launch_backward(a, *ends, left, 0 if a.causal else right, from_storage=True)
    # Returned unwritten, as by the real kernel.
    shape = (batch, heads, a.max_seqlen_q)
    return [a.dq, a.dk, a.dv, torch.empty(shape, dtype=torch.float32, device=a.q.device)]


def launch_backward(
    a: SimpleNamespace,
    ends_q: list[int],
    ends_k: list[int],
    left: int,
    right: int,
    from_storage: bool,
) -> None:
    """Fills dq, dk and dv; sequence b has the rows from ends[b] to ends[b + 1]."""
    (heads, dim), (heads_k, dim_v) = a.q.shape[-2:], a.v.shape[-2:]
    names = ["q", "k", "v", "out", "dout", "softmax_lse", "dq", "dk", "dv"]
    m = SimpleNamespace(**{name: Memory(getattr(a, name), from_storage) for name in names})
    seed = None if a.deterministic else next(_calls)

    def rows(span: tuple[int, int], heads: int, head: int, dim: int) -> Tensor:
        return ((torch.arange(*span) * heads + head) * dim)[:, None] + torch.arange(dim)

    def kernel() -> None:
        dk_sum = dv_sum = torch.zeros(())
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        sequences = itertools.product(itertools.pairwise(ends_q), range(heads))
        for i, (at_q, head) in enumerate(sequences):
            b, head_k = i // heads, head * heads_k // heads
            at_k = ends_k[b], ends_k[b + 1]
            q_at, o_at = (rows(at_q, heads, head, d) for d in (dim, dim_v))
            k_at, v_at = (rows(at_k, heads_k, head_k, d) for d in (dim, dim_v))
            lse_at = torch.arange(*at_q)
            if a.varlen:
                lse_at += head * ends_q[-1]
            else:
                lse_at += b * (heads - 1) * a.max_seqlen_q + head * a.max_seqlen_q
            inputs = m.q[q_at], m.out[o_at], m.dout[o_at], m.k[k_at], m.v[v_at]
            dq, dk, dv = _head(
                *(x.float() for x in inputs), m.softmax_lse[lse_at], a.scale, a.softcap, left,
                right, a.q.dtype, generator,
            )  # fmt: skip
            if head % (heads // heads_k) != 0:  # not the first of its group
                dk, dv = dk_sum + dk, dv_sum + dv
            dk_sum, dv_sum = dk, dv
            m.dq[q_at], m.dk[k_at], m.dv[v_at] = dq, dk_sum, dv_sum

    launch(a.q.device, kernel)


def _head(
    q: Tensor,
    out: Tensor,
    dout: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one head, block by block; in a random order if there is a generator."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (out * dout).sum(1)
    blocks = list(itertools.product(range(0, len(q), ROWS), range(0, len(k), COLUMNS)))
    order = range(len(blocks))
    if generator is not None:
        order = torch.randperm(len(blocks), generator=generator).tolist()
    for r, c in (blocks[i] for i in order):
        i, j = slice(r, r + ROWS), slice(c, c + COLUMNS)
        s = q[i] @ k[j].T * scale
        slope = torch.ones_like(s)
        if softcap > 0:
            capped = torch.tanh(s / softcap)
            s, slope = capped * softcap, 1 - capped**2
        ahead = torch.arange(len(k))[j] - (torch.arange(len(q))[i, None] + len(k) - len(q))
        hidden = (ahead > right) & (right >= 0) | (ahead < -left) & (left >= 0)
        p = torch.exp(s - lse[i, None]).masked_fill(hidden, 0.0)
        ds = (p * (dout[i] @ v[j].T - delta[i, None]) * slope * scale).to(dtype).float()
        dv[j] += p.to(dtype).float().T @ dout[i]
        dq[i] += ds @ k[j]
        dk[j] += ds.T @ q[i]
    return dq, dk, dv
