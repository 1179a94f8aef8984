"""VLLM_BATCH_INVARIANT=1 on CPU: a request's log-probabilities have the same bits alone and in any
batch, and those of transformers' model under fa3_ops.batch_invariant."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum

PROVIDER = "fa3_ops"  # of implementations of vLLM's operations
WORKER = "fa3_ops.integrations.vllm.worker.BatchInvariantWorker"


def configure(config: Any) -> None:
    """Makes vLLM's configuration batch-invariant: our attention, PyTorch's forms of the other
    layers, not compiled, in a worker that gives these our products. Raises ValueError with what it
    has that would not be batch-invariant."""
    reasons = obstacles(config)
    if reasons:
        raise ValueError(
            f"VLLM_BATCH_INVARIANT=1 on CPU (fa3_ops) cannot serve: {', '.join(reasons)}"
        )
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.custom_ops = ["none"]
    config.parallel_config.worker_cls = WORKER


def obstacles(config: Any) -> list[str]:
    found = []
    backend = config.attention_config.backend
    if backend not in (None, AttentionBackendEnum.CUSTOM):
        found.append(f"attention_backend {backend.name}, which must be CUSTOM")
    if config.parallel_config.worker_cls not in ("auto", WORKER):
        found.append(f"worker_cls {config.parallel_config.worker_cls}")
    if config.parallel_config.tensor_parallel_size > 1:
        found.append(f"tensor_parallel_size {config.parallel_config.tensor_parallel_size}")
    if config.lora_config is not None:
        found.append("LoRA")
    model = config.model_config
    if model is not None and model.quantization is not None:
        found.append(f"quantization {model.quantization}")
    if model is not None and model.is_moe:
        found.append("mixtures of experts")
    return found


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms the sum that goes on to the next layer, as transformers does. vLLM's own norms it
    before it is rounded to 16 bits."""
    total = x + x_residual
    norm: Tensor = ir.ops.rms_norm.impls["native"].impl_fn(total, weight, epsilon, variance_size)
    return norm, total
