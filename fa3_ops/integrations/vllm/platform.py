"""vLLM's CPU platform, which takes its own attention kernel whatever --attention-backend says."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class Fa3CpuPlatform(CpuPlatform):
    """CpuPlatform, except that CUSTOM is served, or refused with the reasons."""

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
