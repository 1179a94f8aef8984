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
    """Lets vLLM-Ascend's platform, a class, honour --attention-backend CUSTOM. Whatever else it is
    asked for it answers as before."""
    theirs = platform.get_attn_backend_cls

    @functools.wraps(theirs)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *more: Any, **named: Any
    ) -> Any:
        if getattr(selected_backend, "name", None) != "CUSTOM":
            return theirs(selected_backend, attn_selector_config, *more, **named)
        from fa3_ops.integrations.vllm.ascend import Fa3AscendBackend

        config = attn_selector_config._asdict()
        reasons = Fa3AscendBackend.validate_configuration(device_capability=None, **config)
        if reasons:
            raise ValueError(f"fa3_ops' attention backend cannot serve: {', '.join(reasons)}")
        return ASCEND

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


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
