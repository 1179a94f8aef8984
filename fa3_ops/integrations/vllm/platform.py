"""vLLM's CPU platform, which takes its own attention kernel whatever --attention-backend says, and
has nothing for VLLM_BATCH_INVARIANT=1."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class Fa3CpuPlatform(CpuPlatform):
    """CpuPlatform, except that CUSTOM and VLLM_BATCH_INVARIANT=1 are served, or refused with the
    reasons."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        path: str
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            path = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            return path
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                "attention backend CUSTOM (fa3_ops) cannot serve this model: " + "; ".join(reasons)
            )
        path = selected_backend.get_path()
        return path

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        super().apply_config_platform_defaults(vllm_config)
        if envs.VLLM_BATCH_INVARIANT:
            from fa3_ops.integrations.vllm.batch_invariant import configure

            configure(vllm_config)

    @classmethod
    def import_ir_kernels(cls) -> None:
        super().import_ir_kernels()
        import fa3_ops.integrations.vllm.batch_invariant  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
        priority = super().get_default_ir_op_priority(vllm_config)
        if envs.VLLM_BATCH_INVARIANT:
            from fa3_ops.integrations.vllm.batch_invariant import PROVIDER

            priority.fused_add_rms_norm.insert(0, PROVIDER)
        return priority
