"""Stand-ins for the raw kernels of FlashAttention-3 and FlashAttention-4 on CPU tensors.

They take the arguments that the packages' own functions pass on, by the same names; they check what
the kernels check, and that memory is aligned, and compute with the float64 reference. Rows of no
sequence hold NaN afterwards, as memory that nobody wrote may.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends.cuda import flash_attn_3, flash_attn_4
from fa3_ops.backends.cuda.capabilities import FLASH_ATTN_3, FLASH_ATTN_4, Capabilities
from fa3_ops.backends.cuda.flash_attention import Package


def put(
    monkeypatch: pytest.MonkeyPatch,
    can_3: Capabilities = FLASH_ATTN_3,
    can_4: Capabilities = FLASH_ATTN_4,
) -> None:
    """As if both were installed on a machine with a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (9, 0))
    monkeypatch.setattr(flash_attn_3, "package", lambda: Package("3.0.0", Kernels3(), can_3))
    monkeypatch.setattr(flash_attn_4, "package", lambda: Package("4.0.0", Kernels4(), can_4))


def check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


def check_memory(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is None:
            continue
        size = x.element_size()
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        check(x.data_ptr() % 16 == 0, "address is not aligned")
        steps = [stride for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1]
        check(all(step > 0 and step * size % 16 == 0 for step in steps[:-1]), "strides")


def check_vectors(batch_size: int, **vectors: Tensor | None) -> None:
    for name, x in vectors.items():
        if x is None:
            continue
        check(x.dtype == torch.int32, f"{name} must have dtype torch.int32")
        check(x.is_contiguous(), f"{name} must be contiguous")
        check(len(x) == batch_size + name.startswith("cu_"), f"{name} must have shape")


def check_pages(
    page_table: Tensor | None,
    k: Tensor,
    seqused_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    seqused_q: Tensor | None,
    leftpad_k: Tensor | None = None,
) -> None:
    """A page id that is none is an address that is none, and whole blocks are read: a weight of 0
    does not silence NaN."""
    if page_table is None:
        return
    check(page_table.dtype == torch.int32 and page_table.stride(-1) == 1, "page_table")
    check(bool(((page_table >= 0) & (page_table < len(k))).all()), "illegal memory access")
    assert seqused_k is not None
    check(bool((seqused_k <= page_table.shape[1] * k.shape[1]).all()), "illegal memory access")
    rows = seqused_q if cu_seqlens_q is None or seqused_q is not None else cu_seqlens_q.diff()
    for b, used in enumerate(seqused_k.tolist()):
        if used == 1 or (rows is not None and rows[b] == 0):
            continue  # no keys, or nobody who reads them
        first = 0 if leftpad_k is None else int(leftpad_k[b])
        read = k[page_table[b]].flatten(0, 1)[first:used].float()
        check(bool(read.isfinite().all()), "NaN is read")


def unwrite(
    out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None, seqused_q: Tensor | None
) -> None:
    """NaN in the rows of no sequence."""
    if cu_seqlens_q is None and seqused_q is None:
        return
    written = torch.zeros(out.shape[:-2], dtype=torch.bool)
    cu = cu_seqlens_q
    for b in range(out.shape[0] if cu is None else len(cu) - 1):
        rows = written[b] if cu is None else written[int(cu[b]) : int(cu[b + 1])]
        rows[: None if seqused_q is None else int(seqused_q[b])] = True
    out[~written] = float("nan")
    lse.masked_fill_(~written[..., None, :], float("nan"))


def gradients(
    written: tuple[Tensor, Tensor, Tensor],
    *tensors: Tensor,
    dlse: Tensor | None = None,
    **arguments: Any,
) -> None:
    """By the CPU's kernels from (dout, q, k, v, out, softmax_lse), into the rows of `written` that
    a sequence has."""
    with fa3_ops.use_backend("cpu"):
        found = torch.ops.fa3npu.flash_attn_varlen_func_backward(
            *tensors, dsoftmax_lse=dlse, **arguments
        )
    all_rows = not any(isinstance(x, Tensor) for x in arguments.values())
    for into, grad in zip(written, found, strict=True):
        of_some = (grad.abs().sum((-2, -1)) > 0) | all_rows
        into[of_some] = grad[of_some]


class Kernels3:
    """torch.ops.flash_attn_3."""

    def fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_v: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        page_table: Tensor | None,
        kv_batch_idx: Tensor | None,
        leftpad_k: Tensor | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
        v_descale: Tensor | None,
        softmax_scale: float,
        is_causal: bool,
        window_size_left: int,
        window_size_right: int,
        attention_chunk: int,
        softcap: float,
        num_splits: int,
    ) -> tuple[Tensor, Tensor, None, None]:
        check_memory(q, k, v, q_v)
        batch_size = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        check_vectors(
            batch_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            kv_batch_idx=kv_batch_idx,
            leftpad_k=leftpad_k,
        )
        check(page_table is None or kv_batch_idx is None, "rows of the table are selected before")
        check_pages(page_table, k, seqused_k, cu_seqlens_q, seqused_q, leftpad_k)
        self.check_widths(q, k, v, q_v)
        for descale in (q_descale, k_descale, v_descale):
            fits = descale is None or descale.shape == (batch_size, k.shape[-2])
            check(fits and (descale is None or q.dtype.itemsize == 1), "descale must have shape")
        check(num_splits <= 256, "num_splits > 256 not supported")
        check(softmax_scale > 0, "NaN: exp of what is above the greatest score")
        check((cu_seqlens_q is None) == (max_seqlen_q is None), "max_seqlen_q must be provided")
        check((cu_seqlens_k is None) or max_seqlen_k is not None, "max_seqlen_k must be provided")
        out, lse = reference.batched(
            *(q, k, v),
            qv=q_v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            cache_batch_idx=kv_batch_idx,
            cache_leftpad=leftpad_k,
            page_table=page_table,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=is_causal,
            window_size=(window_size_left, window_size_right),
            attention_chunk=attention_chunk,
            softcap=softcap,
        )
        out = out.to(torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype)
        lse = lse.float()
        unwrite(out, lse, cu_seqlens_q, seqused_q)
        return out, lse, None, None

    def check_widths(self, q: Tensor, k: Tensor, v: Tensor, q_v: Tensor | None) -> None:
        d, d_v = q.shape[-1], v.shape[-1]
        known = q.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
        check(known and q.dtype == k.dtype == v.dtype, "query and key must have the same dtype")
        step = 16 // q.element_size()
        check(d % step == 0 and d_v % step == 0 and d <= 256, "head_size should be a multiple of")
        deepseek = 128 < d <= 192 and 96 < d_v <= 128
        # It takes FP8 of d <= 64 beside any d_v up to 256, and computes 64 of them.
        latent = d <= 64 and d_v <= (512 if q.dtype.itemsize == 2 else 64)
        check(d == d_v or deepseek or latent, "If V headdim is different from Q/K dim")
        check(q_v is None or (d <= 64 and d_v >= 256 and q.dtype.itemsize == 2), "q_v is only")

    def bwd(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        *,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        softmax_scale: float,
        is_causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        deterministic: bool,
    ) -> None:
        check_memory(dout, q, k, v, out, dq, dk, dv)
        check(softmax_lse.is_contiguous(), "softmax_lse")
        check(max(q.shape[-1], v.shape[-1]) <= 256, "head dimension at most 256")
        widest = max(q.shape[-1], v.shape[-1])
        check(not deterministic or widest <= 192, "Deterministic backward not supported")
        gradients(
            *((dq, dk, dv), dout, q, k, v, out, softmax_lse),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=is_causal,
            window_size=(window_size_left, window_size_right),
            softcap=softcap,
        )


class Kernels4:
    """The module flash_attn.cute.interface on Hopper."""

    def _flash_attn_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        page_table: Tensor | None,
        softmax_scale: float,
        causal: bool,
        softcap: float,
        window_size_left: int | None,
        window_size_right: int | None,
        learnable_sink: Tensor | None,
        num_splits: int,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor, None, None, None]:
        check_memory(q, k, v)
        batch_size = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        check_vectors(
            batch_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
        )
        check_pages(page_table, k, seqused_k, cu_seqlens_q, seqused_q)
        entries = k if page_table is None else page_table
        check(cu_seqlens_k is not None or len(entries) == batch_size, "batch_size")
        self.check_widths(q, k, v, paged=page_table is not None)
        check(num_splits == 1 and return_lse, "SplitKV not supported on SM 9.0")
        check(softmax_scale > 0, "NaN: exp of what is above the greatest score")
        self.check_sides(window_size_left, window_size_right)
        out, lse = reference.batched(
            *(q, k, v),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            page_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=self.window(window_size_left, window_size_right),
            softcap=softcap,
            sinks=learnable_sink,
        )
        if learnable_sink is not None:  # of rows that see no key
            lse = torch.where(lse.isneginf(), learnable_sink[:, None].to(lse.dtype), lse)
        out, lse = out.to(q.dtype), lse.float()
        unwrite(out, lse, cu_seqlens_q, seqused_q)
        return out, lse, None, None, None

    def check_widths(self, q: Tensor, k: Tensor, v: Tensor, paged: bool) -> None:
        d, d_v = q.shape[-1], v.shape[-1]
        known = q.dtype in (torch.float16, torch.bfloat16)
        check(known and q.dtype == k.dtype == v.dtype, "inputs must be float16 or bfloat16")
        step = 16 if paged else 8
        check(d % step == d_v % step == 0 and max(d, d_v) <= 256, "is not supported on SM90")

    def check_sides(self, left: int | None, right: int | None) -> None:
        """A negative side alone would count as a number; numbers have 32 bits."""
        check(all(n is None or 0 <= n < 2**30 for n in (left, right)), "window_size")

    def window(self, left: int | None, right: int | None) -> tuple[int, int]:
        return -1 if left is None else left, -1 if right is None else right

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        softcap: float,
        window_size_left: int | None,
        window_size_right: int | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        deterministic: bool,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dlse: Tensor | None,
    ) -> None:
        check_memory(dout, q, k, v, out, dq, dk, dv)
        check(q.shape[-1] == v.shape[-1] or q.shape[-2] == k.shape[-2], "GQA backward requires")
        self.check_sides(window_size_left, window_size_right)
        gradients(
            *((dq, dk, dv), dout, q, k, v, out, lse),
            dlse=dlse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=self.window(window_size_left, window_size_right),
            softcap=softcap,
        )
