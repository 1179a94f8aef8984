"""Importing this module gives veRL an FSDP engine with batch-invariant linear layers, in the place
of its own: veRL imports what `actor_rollout_ref.model.external_lib` names, and calls nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from fa3_ops import batch_invariant
from fa3_ops.integrations.transformers import NAMES


# veRL prefers an engine of a device and its vendor to one of a device, as its own is.
@EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],
    device=get_device_name(),
    vendor=get_vendor(),
)
class BatchInvariantFSDPEngine(FSDPEngineWithLMHead):
    """veRL's engine, whose nn.Linear layers are fa3_ops.batch_invariant.Linear, those of LoRA among
    them. Where attention is ours too, a token's log-probability depends on its sequence alone.

    Raises NotImplementedError for what would pass our attention by: sequence parallelism, and
    models whose attention veRL replaces by its own.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        size = engine_config.ulysses_sequence_parallel_size
        if size > 1 and _is_ours(model_config.hf_config):
            raise NotImplementedError(
                f"fa3npu: ulysses_sequence_parallel_size must be 1, got {size}"
            )
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if _is_ours(self.model_config.hf_config):
            refuse_replaced_attention(module)
        wrapped: nn.Module = super()._build_fsdp_module(batch_invariant.convert(module))
        return wrapped


def _is_ours(config: Any) -> bool:
    return config._attn_implementation in NAMES


def refuse_replaced_attention(module: nn.Module) -> None:
    """veRL gives the attention layers of some models, such as Qwen2.5-VL, a forward of its own,
    which calls its own attention function."""
    for layer in module.modules():
        forward = type(layer).forward
        if "Attention" in type(layer).__name__ and forward.__module__.startswith("verl."):
            raise NotImplementedError(
                f"fa3npu: {type(layer).__name__}, which veRL replaced by "
                f"{forward.__module__}.{forward.__qualname__}, with another attention"
            )
