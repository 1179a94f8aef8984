"""fa3_ops as vLLM's attention backend CUSTOM; docs/vllm.md is for its users.

vLLM calls `cpu_platform` and `register`, the entry points of pyproject.toml, in each of its
processes, wherever fa3_ops is installed. Neither changes a thing until CUSTOM is asked for.
"""

from __future__ import annotations

from importlib.metadata import entry_points

BACKEND = "fa3_ops.integrations.vllm.backend.Fa3Backend"
PLATFORM = "fa3_ops.integrations.vllm.platform.Fa3CpuPlatform"


def register() -> None:
    """vllm.general_plugins: gives the name CUSTOM our backend, unless it has another already."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:  # a vLLM that is too old to have the registry
        return
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


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
