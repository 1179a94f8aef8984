"""Who gets our backend, and what is refused when the engine starts."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from engines import OURS, engine
from tiny_models import make
from vllm import envs, platforms
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

import fa3_ops.integrations.vllm as plugin
from fa3_ops.integrations.vllm.batch_invariant import configure
from fa3_ops.integrations.vllm.platform import Fa3CpuPlatform

FITS = AttentionSelectorConfig(64, torch.bfloat16, "auto", 128)


def test_vllm_finds_the_platform() -> None:
    assert type(platforms.current_platform).__qualname__ == "Fa3CpuPlatform"


class TestThePlatform:
    def test_gives_way_to_another_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group = "vllm.platform_plugins"
        points = [
            EntryPoint("fa3_ops", "fa3_ops.integrations.vllm:cpu_platform", group),
            EntryPoint("ascend", "vllm_ascend:register", group),
        ]
        monkeypatch.setattr(plugin, "entry_points", lambda group: points)
        assert plugin.cpu_platform() is None
        monkeypatch.setattr(envs, "VLLM_PLUGINS", ["fa3_ops"], raising=False)
        assert plugin.cpu_platform() == plugin.PLATFORM

    @pytest.mark.parametrize("other", [None, "vllm.platforms.zen_cpu.ZenCpuPlatform"])
    def test_stands_for_vllms_cpu_platform_alone(
        self, other: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: other)
        assert plugin.cpu_platform() is None

    @pytest.mark.parametrize("asked", [None, AttentionBackendEnum.CPU_ATTN])
    def test_leaves_vllms_kernel_the_default(self, asked: AttentionBackendEnum | None) -> None:
        path = Fa3CpuPlatform.get_attn_backend_cls(asked, FITS)
        assert path == AttentionBackendEnum.CPU_ATTN.get_path()

    def test_honours_custom(self) -> None:
        plugin.register()
        path = Fa3CpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, FITS)
        assert path == plugin.BACKEND

    @pytest.mark.parametrize(
        ("differences", "reason"),
        [
            ({"head_size": 640}, "head_size not supported"),
            ({"dtype": torch.float64}, "dtype not supported"),
            ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype not supported"),
            (
                {"kv_cache_dtype": "float16"},
                "must be auto, fp8 or the model's, torch.bfloat16, got",
            ),
            ({"use_mla": True}, "MLA not supported"),
            ({"use_sparse": True}, "sparse not supported"),
            ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
            ({"use_rswa": True}, "R-SWA not supported"),
            ({"use_pcp": True}, "PCP not supported"),
            ({"use_dcp": True}, "DCP not supported"),
        ],
    )
    def test_refuses_custom_with_the_reason(self, differences: dict[str, Any], reason: str) -> None:
        plugin.register()
        with pytest.raises(ValueError, match=r"CUSTOM \(fa3_ops\) cannot serve.*" + reason):
            Fa3CpuPlatform.get_attn_backend_cls(
                AttentionBackendEnum.CUSTOM, FITS._replace(**differences)
            )

    @pytest.mark.parametrize(
        "differences",
        [
            {"has_sink": True},
            {"has_sliding_window": True},
            {"use_non_causal": True},
            {"use_batch_invariant": True},
            {"block_size": 16},
            {"head_size": 80},
            {"dtype": torch.float32},
            {"kv_cache_dtype": "bfloat16"},
            {"kv_cache_dtype": "fp8"},
            {"kv_cache_dtype": "fp8_e5m2", "dtype": torch.float32},
            {"use_per_head_quant_scales": True},
            *({"attn_type": kind} for kind in AttentionType),
        ],
    )
    def test_serves(self, differences: dict[str, Any]) -> None:
        plugin.register()
        selector = FITS._replace(**differences)
        path = Fa3CpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, selector)
        assert path == plugin.BACKEND


class TestBatchInvariance:
    """What VLLM_BATCH_INVARIANT=1 makes of a configuration."""

    @staticmethod
    def config(**differences: Any) -> SimpleNamespace:
        model = {"quantization": None, "is_moe": False}
        parallel = {"worker_cls": "auto", "tensor_parallel_size": 1}
        parts = {
            "model_config": SimpleNamespace(**model | differences.pop("model", {})),
            "parallel_config": SimpleNamespace(**parallel | differences.pop("parallel", {})),
            "attention_config": SimpleNamespace(backend=None),
            "compilation_config": SimpleNamespace(mode=None, custom_ops=["all"]),
            "lora_config": None,
        }
        return SimpleNamespace(**parts | differences)

    @pytest.mark.parametrize("asked", [False, True])
    def test_only_where_it_is_asked_for(self, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", asked, raising=False)
        config = self.config()
        for _ in range(2):  # vLLM makes its configuration twice
            Fa3CpuPlatform.apply_config_platform_defaults(config)
        assert (config.attention_config.backend is AttentionBackendEnum.CUSTOM) == asked
        assert (config.compilation_config.custom_ops == ["none"]) == asked
        assert (config.parallel_config.worker_cls != "auto") == asked
        first = Fa3CpuPlatform.get_default_ir_op_priority(config).fused_add_rms_norm[0]
        assert first == ("fa3_ops" if asked else "native")

    @pytest.mark.parametrize(
        ("differences", "reason"),
        [
            (
                {"attention_config": SimpleNamespace(backend=AttentionBackendEnum.CPU_ATTN)},
                "attention_backend CPU_ATTN, which must be CUSTOM",
            ),
            ({"parallel": {"worker_cls": "another.Worker"}}, "worker_cls another.Worker"),
            ({"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size 2"),
            ({"lora_config": object()}, "LoRA"),
            ({"model": {"quantization": "fp8"}}, "quantization fp8"),
            ({"model": {"is_moe": True}}, "mixtures of experts"),
        ],
    )
    def test_refuses_what_is_not_batch_invariant(
        self, differences: dict[str, Any], reason: str
    ) -> None:
        message = rf"VLLM_BATCH_INVARIANT=1 on CPU \(fa3_ops\) cannot serve: {reason}$"
        with pytest.raises(ValueError, match=message):
            configure(self.config(**differences))


class TestTheRegistration:
    def test_leaves_anothers_custom_alone(self) -> None:
        AttentionBackendEnum.CUSTOM.clear_override()
        vllm.v1.attention.backends.registry.register_backend(
            AttentionBackendEnum.CUSTOM, "another.Backend"
        )
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another.Backend"
        AttentionBackendEnum.CUSTOM.clear_override()
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == plugin.BACKEND

    def test_imports_nothing_of_the_backend(self) -> None:
        code = (
            "import sys, fa3_ops.integrations.vllm as plugin; assert 'vllm' not in sys.modules;"
            "plugin.register(); plugin.cpu_platform();"
            "sys.exit('fa3_ops.integrations.vllm.backend' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_vllm_that_is_not_served_is_told_which_are(self) -> None:
        code = "import vllm; vllm.__version__ = '0.31.2'; import fa3_ops.integrations.vllm.backend"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.stderr.strip().endswith(
            "ImportError: fa3_ops' attention backend needs vLLM 0.32 or 0.33, got 0.31.2"
        )


def test_an_engine_is_refused_when_it_starts(folder: Path) -> None:
    with (
        pytest.raises(ValueError, match="kv_cache_dtype must be auto, fp8 or the model's"),
        engine(make("qwen3", folder), kv_cache_dtype="float16", **OURS),
    ):
        pass
