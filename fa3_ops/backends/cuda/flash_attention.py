"""What the backends of FlashAttention-3 and FlashAttention-4 have in common.

Both read lengths on the device, so that a graph can record them. What a call needs beyond their
kernels is little: valid page ids, aligned activations, and results for rows that no kernel writes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import AnyRequest, Backend, Run
from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.cuda.capabilities import (
    Capabilities,
    has_lengths,
    no_gradient,
    not_supported,
)
from fa3_ops.backends.lowering.alignment import aligned, contiguous
from fa3_ops.backends.lowering.completion import blind_rows, clear, count_sinks
from fa3_ops.backends.lowering.keys import bound, select_table_rows, without_hidden_pages

HOPPER = 9  # the compute capability that the kernels are for
VECTORS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("cache_batch_idx", "cache_leftpad", "sinks"),
)


@dataclass(frozen=True)
class Package:
    """An installed package: its raw kernels, and what they compute."""

    version: str
    kernels: Any
    can: Capabilities


def readable(call: Attention) -> Attention:
    """The call with its tensors as the kernels want them in memory; a cache is so already."""
    vectors: dict[str, Any] = {name: contiguous(getattr(call, name)) for name in VECTORS}
    qv = None if call.qv is None else aligned(call.qv)
    q, k, v = map(aligned, (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, qv=qv, **vectors)


class FromPackage(Backend[AnyRequest]):
    def package(self) -> Package | str:
        """The installed one, or why there is none to use. Imports it."""
        raise NotImplementedError

    def found(self) -> Package:
        """Where there is one."""
        found = self.package()
        assert isinstance(found, Package), found
        return found

    def why_not_here(self, at: torch.device) -> list[str]:
        """Why it serves no call on this device."""
        major, minor = torch.cuda.get_device_capability(at)
        if major != HOPPER:
            return [f"compute capability {major}.{minor}"]
        found = self.package()
        return [found] if isinstance(found, str) else []


class FlashAttention(FromPackage[Attention]):
    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        reasons = self.why_not_here(request.device)
        return reasons or not_supported(request, self.found().can)

    def lower(self, request: Attention, run: Run) -> Attention:
        run.note("the bitwise contract is not kept")
        return readable(bound(without_hidden_pages(select_table_rows(request, run))))

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        sinks = None if self.found().can.sinks else request.sinks
        with torch.cuda.device_of(lowered.q):
            out, softmax_lse = self.forward(lowered)
        if has_lengths(lowered) or request.sinks is not None:
            clear(out, softmax_lse, blind_rows(request))
        return (out, softmax_lse) if sinks is None else count_sinks(out, softmax_lse, sinks)

    def forward(self, call: Attention) -> tuple[Tensor, Tensor]:
        """The raw kernel: (out, softmax_lse), of which rows without keys may hold anything."""
        raise NotImplementedError


class FlashAttentionGradient(FromPackage[Gradient]):
    def not_supported_reasons(self, request: Gradient, run: Run) -> list[str]:
        reasons = self.why_not_here(request.device)
        return reasons or no_gradient(request, self.found().can)

    def lower(self, request: Gradient, run: Run) -> Gradient:
        return replace(
            request,
            call=readable(request.call),
            dout=aligned(request.dout),
            out=aligned(request.out),
            softmax_lse=request.softmax_lse.contiguous(),
            dsoftmax_lse=contiguous(request.dsoftmax_lse),
        )

    def launch(
        self, request: Gradient, lowered: Gradient, run: Run
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = lowered.call
        # Rows that belong to no sequence are written by nobody.
        make = torch.zeros if has_lengths(call) else torch.empty
        dq, dk, dv = (
            make(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v)
        )
        with torch.cuda.device_of(call.q):
            self.backward(lowered, dq, dk, dv)
        return dq, dk, dv

    def backward(self, request: Gradient, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """The raw kernel, which writes dq, dk and dv."""
        raise NotImplementedError
