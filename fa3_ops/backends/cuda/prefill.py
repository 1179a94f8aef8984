"""Attention on CUDA: by Triton, and prefill on Hopper by a kernel that knows its copy engine and
its products of a warpgroup. Both give the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.alignment import is_aligned
from fa3_ops.backends.triton.attention import NEIGHBOURS, Results, TritonAttention, capacity_of
from fa3_ops.backends.triton.device import processors
from fa3_ops.backends.triton.launch import Launch
from fa3_ops.backends.triton.schedule import CHUNK, block_n

ROWS_OF_A_TILE = 128
STAGES = {64: 8, 128: 4}  # of k and v in shared memory, by head dimension; powers of 2
NOT_SERVED = (
    *("qv", "seqused_q", "cache_batch_idx", "cache_leftpad", "cache_start"),
    *("alibi_slopes", "sinks"),
)


class CudaAttention(TritonAttention):
    def settle(self, request: Attention) -> Callable[[Attention], tuple[Tensor, Tensor]]:
        return Prefill(request) if prefills_on_hopper(request) else super().settle(request)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import fa3_ops.backends.cuda.kernels.prefill  # noqa: F401  Gluon is young
    except ImportError:
        return False
    return True


def prefills_on_hopper(call: Attention) -> bool:
    """Whether the call fills tiles for every processor, and has nothing but a causal mask."""
    group = call.nheads // call.nheads_k
    tiles = -(-call.seqlen_q * group // ROWS_OF_A_TILE) * call.batch_size * call.nheads_k
    return (
        call.seqlen_q * group > ROWS_OF_A_TILE // 2  # first: most calls are decodes
        and call.q.dtype in (torch.float16, torch.bfloat16)
        and call.k.dtype == call.q.dtype
        and call.headdim == call.headdim_v
        and call.headdim in STAGES
        and group in (1, 2, 4, 8, 16, 32, 64)
        and (call.causal or max(call.window_size) < 0)
        and call.attention_chunk == 0
        and call.softcap == 0.0
        and (call.softmax_scale or 0.0) > 0.0
        and all(getattr(call, name) is None for name in NOT_SERVED)
        and (call.page_table is None or call.k.shape[1] % keys_of_a_block(call) == 0)
        and all(is_aligned(x) for x in (call.q, call.k, call.v))
        and tiles >= processors(call.q.device)
        and is_hopper(call.q.device)
    )


def keys_of_a_block(call: Attention) -> int:
    return block_n(call.q.dtype, call.headdim, call.headdim_v)


class Prefill:
    """Of calls that differ from one in nothing but where their tensors lie."""

    def __init__(self, call: Attention) -> None:
        from fa3_ops.backends.cuda.kernels.prefill import prefill

        self.results = Results(call)
        group, self.keys = call.nheads // call.nheads_k, keys_of_a_block(call)
        tiles = -(-call.seqlen_q * group // ROWS_OF_A_TILE)
        items = tiles * call.batch_size * call.nheads_k
        table_row = 1 if call.page_table is None else call.page_table.stride(0)
        self.kernel = Launch(
            prefill,
            min(items, processors(call.q.device)),
            *(call.batch_size, call.seqlen_q, call.q.shape[0], capacity_of(call)),
            *(call.k.shape[0], tiles, items),
            *(call.softmax_scale, table_row, call.nheads_k),
            GROUP=group,
            DIM=call.headdim,
            BLOCK_N=self.keys,
            CHUNK=CHUNK,
            PAGE_SIZE=0 if call.page_table is None else call.k.shape[1],
            CAUSAL=call.causal,
            NEIGHBOURS=NEIGHBOURS,
            STAGES=STAGES[call.headdim],
            PACKED_Q=call.cu_seqlens_q is not None,
            PACKED_K=call.cu_seqlens_k is not None,
            USED_K=call.seqused_k is not None,
            num_warps=4,
            maxnreg=168,
        )

    def __call__(self, call: Attention) -> tuple[Tensor, Tensor]:
        out, lse = self.results()
        group = call.nheads // call.nheads_k
        given = (call.page_table, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k)
        self.kernel(
            described(call.q, call.cu_seqlens_q is not None, 64 // group, group),
            described(call.k, call.cu_seqlens_k is not None, self.keys, 1),
            described(call.v, call.cu_seqlens_k is not None, self.keys, 1),
            *(out, lse, *(lse if x is None else x for x in given)),
        )
        return out, lse


def described(x: Tensor, packed: bool, rows: int, heads: int) -> Any:
    """A descriptor of (entry, row, head, column), of which a block has so many rows and heads."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x = x[None] if packed else x
    width = x.shape[-1]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, heads, width], layout)
