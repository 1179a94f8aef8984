"""FlashAttention-3's own kernels: of flash_attn_3, or of fa3_fwd, its smaller build on PyPI.

Only the extension is loaded. Their Python functions (flash_attn_interface, fa3_fwd_interface) are
not used: they register operators that declare no mutation.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from importlib.machinery import PathFinder

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.cuda.capabilities import of_build
from fa3_ops.backends.cuda.flash_attention import (
    FlashAttention,
    FlashAttentionGradient,
    Package,
)

# The packages and the modules that say how they were built, the more complete one first.
PACKAGES = {"flash_attn_3": "flash_attn_config", "fa3_fwd": "fa3_fwd_config"}


def extension(package: str) -> str | None:
    """The file of a package's extension, without importing anything of the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        return None
    spec = PathFinder.find_spec("_C", list(found.submodule_search_locations))
    return None if spec is None else spec.origin


@functools.cache
def package() -> Package | str:
    """The first that is installed, or why there is none to use."""
    for name, config in PACKAGES.items():
        file = extension(name)
        if file is None:
            continue
        try:
            torch.ops.load_library(file)
            flags = importlib.import_module(config).CONFIG["build_flags"]
            version = importlib.metadata.version(name)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{name} does not load: {error}"
        return Package(version, getattr(torch.ops, name), of_build(name, flags))
    return f"neither {' nor '.join(PACKAGES)} is installed"


class FlashAttn3(FlashAttention):
    """By default FlashAttention-3 splits the keys by the size of the batch; with num_splits=1 a row
    of a decode has the same bits in any batch."""

    name = "flash_attn_3"

    def package(self) -> Package | str:
        return package()

    def forward(self, call: Attention) -> tuple[Tensor, Tensor]:
        found = self.found()
        left, right = (-1, -1) if call.causal else call.window_size
        out, softmax_lse, *_ = found.kernels.fwd(
            call.q,
            call.k,
            call.v,
            q_v=call.qv,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            seqused_q=call.seqused_q,
            seqused_k=call.seqused_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            page_table=call.page_table,
            kv_batch_idx=call.cache_batch_idx,
            leftpad_k=call.cache_leftpad,
            q_descale=by_sequence(call, call.q_descale),
            k_descale=by_sequence(call, call.k_descale),
            v_descale=by_sequence(call, call.v_descale),
            softmax_scale=call.softmax_scale,
            is_causal=call.causal,
            window_size_left=left,
            window_size_right=right,
            attention_chunk=call.attention_chunk,
            softcap=call.softcap,
            num_splits=min(call.num_splits, found.can.max_num_splits),
        )
        return out, softmax_lse


class FlashAttn3Gradient(FlashAttentionGradient):
    name = "flash_attn_3"

    def package(self) -> Package | str:
        return package()

    def backward(self, request: Gradient, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        call = request.call
        left, right = (-1, -1) if call.causal else call.window_size
        self.found().kernels.bwd(
            request.dout,
            call.q,
            call.k,
            call.v,
            request.out,
            request.softmax_lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            seqused_q=call.seqused_q,
            seqused_k=call.seqused_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            softmax_scale=call.softmax_scale,
            is_causal=call.causal,
            window_size_left=left,
            window_size_right=right,
            softcap=call.softcap,
            deterministic=request.deterministic,
        )


def by_sequence(call: Attention, descale: Tensor | None) -> Tensor | None:
    """A descale as (batch_size, nheads_k); None where the dtype has none."""
    if descale is None or not call.is_fp8:
        return None
    return descale.expand(call.batch_size, call.nheads_k)
