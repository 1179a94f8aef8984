"""fa3_ops as vLLM's attention backend CUSTOM; docs/vllm.md is for its users.

vLLM calls `cpu_platform` and `register`, the entry points of pyproject.toml, in each of its
processes, wherever fa3_ops is installed. Neither changes a thing until CUSTOM is asked for.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

BACKEND = "fa3_ops.integrations.vllm.backend.Fa3Backend"
ASCEND = "fa3_ops.integrations.vllm.ascend.Fa3AscendBackend"
PLATFORM = "fa3_ops.integrations.vllm.platform.Fa3CpuPlatform"


def register() -> None:
    """vllm.general_plugins: gives the name CUSTOM our backend, unless it has another already."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:  # a vLLM that is too old to have the registry
        return
    from vllm.platforms import current_platform

    if current_platform.device_type == "npu":
        _serve_ascend(type(current_platform))
    elif not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def _serve_ascend(platform: Any) -> None:
    """Lets vLLM-Ascend's platform, a class, honour --attention-backend CUSTOM, which it would take
    back. Whatever else it is asked for it answers as before."""
    update, answer = platform.check_and_update_config, platform.get_attn_backend_cls

    @functools.wraps(update)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        asked = vllm_config.attention_config.backend
        update(vllm_config)
        if _is_custom(asked):
            vllm_config.attention_config.backend = asked

    @functools.wraps(answer)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *more: Any, **named: Any
    ) -> Any:
        if not _is_custom(selected_backend):
            return answer(selected_backend, attn_selector_config, *more, **named)
        from fa3_ops.integrations.vllm.ascend import Fa3AscendBackend

        config = attn_selector_config._asdict()
        reasons = Fa3AscendBackend.validate_configuration(device_capability=None, **config)
        if reasons:
            raise ValueError(f"fa3_ops' attention backend cannot serve: {', '.join(reasons)}")
        return ASCEND

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _is_custom(backend: Any) -> bool:
    return getattr(backend, "name", None) == "CUSTOM"


def cpu_platform() -> str | None:
    """vllm.platform_plugins: vLLM's CPU platform, but one that honours --attention-backend CUSTOM.
    None where vLLM would not take that platform, or where another plugin brings one."""
    from vllm import envs, platforms

    others = [
        plugin.name
        for plugin in entry_points(group="vllm.platform_plugins")
        if plugin.module != __name__
        and (envs.VLLM_PLUGINS is None or plugin.name in envs.VLLM_PLUGINS)
    ]
    if others or platforms.cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return PLATFORM
