"""The demo on the emulated NPU: the same tokens as on CPU, whichever way its step is compiled."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


def run(demo: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """The generated texts of a run that agrees with itself."""
    capsys.readouterr()
    status = demo.main([*SMALL, *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "eager = compiled = recomputed: yes" in out
    texts = re.findall(r"^--- .*?(?=^---|^decoding)", out, flags=re.MULTILINE | re.DOTALL)
    assert len(texts) == 3
    return texts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        ("float32", ("--backend", "npugraph_ex")),
        ("bfloat16", ("--backend", "npugraph_ex")),
        ("bfloat16", ("--backend", "ge", "--run-eagerly")),
    ],
    ids=["float32-npugraph_ex", "bfloat16-npugraph_ex", "bfloat16-ge"],
)
def test_same_tokens_as_on_cpu(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], dtype: str, backend: tuple[str, ...]
) -> None:
    on_cpu = run(demo, capsys, "--device", "cpu", "--dtype", dtype, "--backend", "aot_eager")
    torch._dynamo.reset()
    on_npu = run(demo, capsys, "--device", "npu", "--dtype", dtype, *backend)
    assert on_npu == on_cpu


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
