"""What vLLM-Ascend needs besides NPUs and has no build of here: see install()."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def compute(
    num_requests: int,
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    block_size: int,
    slot_mapping: Tensor,
    padding: int,
) -> None:
    """slot_mapping[token] becomes block * block_size + offset; behind the last token, padding."""
    starts = query_start_loc[: num_requests + 1].cpu().long()
    requests = torch.repeat_interleave(torch.arange(num_requests), starts.diff())
    position = positions[: len(requests)].cpu().long()
    blocks = block_table.cpu().long()[requests, position // block_size]
    slots = torch.full(slot_mapping.shape, padding, dtype=slot_mapping.dtype)
    slots[: len(requests)] = blocks * block_size + position % block_size
    slot_mapping.copy_(slots)


class SlotMapping:
    """Takes the place of vLLM's Triton kernel, and is launched like it, kernel[grid](arguments):
    one program a request, and one for the padding."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            num_tokens: int,
            max_num_tokens: int,
            query_start_loc: Tensor,
            positions: Tensor,
            block_table: Tensor,
            block_table_stride: int,
            block_size: int,
            slot_mapping: Tensor,
            *,
            TOTAL_CP_WORLD_SIZE: int,
            PAD_ID: int,
            **constants: Any,
        ) -> None:
            if TOTAL_CP_WORLD_SIZE != 1:
                raise NotImplementedError("context parallelism")
            where = (query_start_loc, positions, block_table, block_size, slot_mapping)
            compute(grid[0] - 1, *where, PAD_ID)

        return launch


def experts(method: object, fused_experts_input: Any) -> Any:
    """Takes the place of vLLM-Ascend's chain of kernels, which sorts tokens by their experts: each
    expert works on all tokens, and weighs 0 where it was not chosen."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm_ascend.ops.activation import AscendSwigluOAIAndMul
    from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult

    given, weights = fused_experts_input, fused_experts_input.weights
    if given.activation != MoEActivation.SWIGLUOAI:
        raise NotImplementedError(f"experts with the activation {given.activation}")
    out = torch.zeros_like(given.hidden_states)
    for expert, (w1, b1, w2, b2) in enumerate(
        zip(weights.w1, weights.w1_bias, weights.w2, weights.w2_bias, strict=True)
    ):
        inner = AscendSwigluOAIAndMul.swiglu_oai_forward(given.hidden_states @ w1 + b1)
        weight = (given.topk_weights * (given.topk_ids == expert)).sum(-1, keepdim=True)
        out += weight * (inner @ w2 + b2)
    return FusedExpertsResult(routed_out=out)


def name_torchvision() -> None:
    """vLLM-Ascend imports models of images, and those a module of torchvision that only they would
    use. Registries have it for torch with CUDA, where it cannot be loaded beside one without."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return  # and this answer is kept: transformers does without it
    name = "torchvision"
    outer = sys.modules[name] = ModuleType(name)
    for part in ("transforms", "v2", "functional"):
        name = f"{name}.{part}"
        inner = sys.modules[name] = ModuleType(name)
        setattr(outer, part, inner)
        outer = inner


def install() -> None:
    """In a process with NPUs, before vLLM is imported."""
    name_torchvision()
    import vllm_ascend.ops  # before the rest of it, which imports in circles
    import vllm_ascend.worker.block_table
    from vllm_ascend.device.device_op import A5DeviceAdaptor, DeviceOperator
    from vllm_ascend.ops.fused_moe import experts_selector
    from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl

    # vLLM-Ascend has no other kernel of this than one in Triton, for triton-ascend's compiler.
    vllm_ascend.worker.block_table._compute_slot_mapping_kernel = SlotMapping()
    # Built by CANN's compiler for all chips but the 950, whose way is torch_npu's operator.
    DeviceOperator.npu_gemma_rms_norm = staticmethod(A5DeviceAdaptor.npu_gemma_rms_norm)
    # For models with experts: vLLM-Ascend's own choice in torch operators, and experts in such.
    experts_selector.check_npu_moe_gating_top_k = lambda **arguments: False
    AllGatherCommImpl.fused_experts = experts
