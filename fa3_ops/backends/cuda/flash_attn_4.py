"""FlashAttention-4 (flash-attn-4), whose kernels are compiled when a kind of call first wants them:
call once before a capture. On Hopper they read 16-bit numbers and do not split the keys."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from torch import Tensor

from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.cuda.capabilities import FLASH_ATTN_4
from fa3_ops.backends.cuda.flash_attention import (
    FlashAttention,
    FlashAttentionGradient,
    Package,
)

DISTRIBUTION = "flash-attn-4"  # other releases of flash-attn have a module of the same name

NO_LIMIT = 2**30  # more than a sequence has keys: positions have 32 bits


@functools.cache
def package() -> Package | str:
    """The installed one, or why there is none to use."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed"
    try:
        kernels = importlib.import_module("flash_attn.cute.interface")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{DISTRIBUTION} does not load: {error}"
    return Package(version, kernels, FLASH_ATTN_4)


class FlashAttn4(FlashAttention):
    name = "flash_attn_4"

    def package(self) -> Package | str:
        return package()

    def forward(self, call: Attention) -> tuple[Tensor, Tensor]:
        left, right = sides(call)
        out, softmax_lse, *_ = self.found().kernels._flash_attn_fwd(
            call.q,
            call.k,
            call.v,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            seqused_q=call.seqused_q,
            seqused_k=call.seqused_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            page_table=call.page_table,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            softcap=call.softcap,
            window_size_left=left,
            window_size_right=right,
            learnable_sink=call.sinks,
            num_splits=1,
            return_lse=True,
        )
        return out, softmax_lse


class FlashAttn4Gradient(FlashAttentionGradient):
    name = "flash_attn_4"

    def package(self) -> Package | str:
        return package()

    def backward(self, request: Gradient, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        call = request.call
        left, right = sides(call)
        self.found().kernels._flash_attn_bwd(
            call.q,
            call.k,
            call.v,
            request.out,
            request.dout,
            request.softmax_lse,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            softcap=call.softcap,
            window_size_left=left,
            window_size_right=right,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            seqused_q=call.seqused_q,
            seqused_k=call.seqused_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            deterministic=request.deterministic,
            dq=dq,
            dk=dk,
            dv=dv,
            dlse=request.dsoftmax_lse,
        )


def sides(call: Attention) -> tuple[int | None, int | None]:
    """The window, where None is no limit; a causal mask is said by its own argument."""
    left, right = (side if 0 <= side < NO_LIMIT else None for side in call.window_size)
    return (None, None) if call.causal else (left, right)
