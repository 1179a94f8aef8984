"""Ascend NPU. Importing this touches no device and needs no torch_npu.

docs/npu.md says which kernel serves which call.
"""

from __future__ import annotations

import torch

from fa3_ops.backends import torch_ops, triton
from fa3_ops.backends.call import (
    Append,
    Attention,
    Combination,
    Gradient,
    Linear,
    Plan,
    Rotation,
    Scatter,
)
from fa3_ops.backends.devices import Device
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.batch_invariant_ops import BatchInvariantOps
from fa3_ops.backends.npu.flash_attn_npu import FlashAttnNpu
from fa3_ops.backends.npu.flash_attn_npu_backward import FlashAttnNpuGradient
from fa3_ops.backends.npu.flash_attn_npu_plan import FlashAttnNpuPlan
from fa3_ops.backends.npu.fused_infer_attention import FusedInferAttention
from fa3_ops.backends.npu.ge.torchair import attach_when_loaded
from fa3_ops.backends.npu.prepare import prepare
from fa3_ops.backends.npu.scatter_pa_kv_cache import ScatterPaKvCache
from fa3_ops.backends.npu.scheduler_metadata import empty_plan
from fa3_ops.backends.npu.triton_ascend import ByTritonAscend, blocks_of, most_rows, tile_for

NPU = Device(
    "npu",
    key="PrivateUse1",
    append_rotates=False,
    capturing=device.capturing,
    constant=device.constant,
    prepare=prepare,
    plan=empty_plan,
    backends={
        Attention: [
            FlashAttnNpu(),
            FusedInferAttention(),
            ByTritonAscend(triton.TritonAttention(most_rows)),
            torch_ops.TorchAttention(),
        ],
        Gradient: [
            FlashAttnNpuGradient(),
            ByTritonAscend(triton.TritonGradient(blocks_of)),
            torch_ops.TorchGradient(),
        ],
        Append: [
            ScatterPaKvCache(),
            ByTritonAscend(triton.TritonWrites()),
            torch_ops.TorchWrites(),
        ],
        Scatter: [
            ScatterPaKvCache(),
            ByTritonAscend(triton.TritonWrites()),
            torch_ops.TorchWrites(),
        ],
        Linear: [
            BatchInvariantOps(),
            ByTritonAscend(triton.TritonLinear(tile_for)),
            torch_ops.TorchLinear(),
        ],
        # Plain torch operators are no fallback here: whoever wants Triton's asks for it by name.
        Rotation: [torch_ops.TorchRotation(), ByTritonAscend(triton.TritonRotation())],
        Combination: [torch_ops.TorchCombination(), ByTritonAscend(triton.TritonCombination())],
        Plan: [FlashAttnNpuPlan()],
    },
)


def register_compilers() -> None:
    """What compilers for the NPU have to know."""
    # A schema in C++ has no place for tags; partitioners of graphs read this list.
    torch.ops.fa3npu.get_scheduler_metadata.default._tags.append(torch.Tag.cudagraph_unsafe)
    attach_when_loaded()
