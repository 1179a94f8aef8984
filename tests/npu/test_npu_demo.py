"""The demo on the emulated NPU: the same tokens as on CPU, whichever way its step is compiled."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from npu_calls import assert_same_tokens
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--steps", "1", "--batch", "128", "--tokens", "12")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    for name in ("train_and_generate", "gpt"):
        sys.modules.pop(name, None)
    torch._dynamo.reset()
    return importlib.import_module("train_and_generate")


def run(demo: ModuleType, *options: str) -> tuple[Any, Any, Tensor]:
    """What a run that agrees with itself generated, eager and compiled, and its noise."""
    seen: list[Any] = []
    check = demo.check

    def spy(model: Any, prompts: Any, eager: Any, compiled: Any, noise: Tensor) -> bool:
        seen.extend((eager, compiled, noise.cpu()))
        return bool(check(model, prompts, eager, compiled, noise))

    demo.check = spy
    assert demo.main([*SMALL, *options]) == 0
    demo.check = check
    return tuple(seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "tie", "backend"),
    [
        ("float32", 1e-4, ("--backend", "npugraph_ex")),
        ("bfloat16", 0.1, ("--backend", "npugraph_ex")),
        ("bfloat16", 0.1, ("--backend", "ge", "--run-eagerly")),
    ],
    ids=["float32-npugraph_ex", "bfloat16-npugraph_ex", "bfloat16-ge"],
)
def test_same_tokens_as_on_cpu(
    demo: ModuleType, dtype: str, tie: float, backend: tuple[str, ...]
) -> None:
    on_cpu, _, noise = run(demo, "--device", "cpu", "--dtype", dtype, "--backend", "aot_eager")
    torch._dynamo.reset()
    eager, compiled, _ = run(demo, "--device", "npu", "--dtype", dtype, *backend)
    for generated in (eager, compiled):
        assert_same_tokens(generated.tokens, on_cpu.tokens, on_cpu.logits + noise, tie)


def test_a_step_that_reads_a_stale_plan_is_noticed(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = demo.PagedCache.plan

    def only_once(cache: Any, config: Any) -> None:
        if cache.scheduler_metadata is None:
            plan(cache, config)

    monkeypatch.setattr(demo.PagedCache, "plan", only_once)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert demo.main([*SMALL, "--device", "npu", "--dtype", "bfloat16"]) == 1
    assert "NO" in capsys.readouterr().out
