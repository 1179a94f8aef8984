"""examples/train_and_generate.py learns, agrees with itself, and notices when it does not."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--device", "cpu", "--steps", "2", "--batch", "128", "--tokens", "24")


def test_learns_and_decodes_alike_eager_compiled_and_recomputed() -> None:
    command = [sys.executable, str(EXAMPLES / "train_and_generate.py"), "--device", "cpu"]
    run = subprocess.run(
        [*command, "--steps", "30", "--tokens", "24"],
        capture_output=True,
        encoding="utf-8",
        # One thread, so that parallel tests do not wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "eager = compiled = recomputed: yes (3 prompts x 24 tokens)" in run.stdout
    losses = re.search(r"training ([\d.]+) -> ([\d.]+), held out ([\d.]+) -> ([\d.]+)", run.stdout)
    assert losses, run.stdout
    training, trained, held_out, learnt = map(float, losses.groups())
    assert trained < training - 2.0
    assert learnt < held_out - 2.0


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program as a module, eager only, which is quick."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which the program sets: undone afterwards
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return importlib.import_module("train_and_generate")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_any_text_dtype_and_prompts(
    demo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    temperature: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 20)
    options = ("--text", str(text), "--dtype", dtype, "--temperature", temperature)
    prompts = ("--prompt", "a", "--prompt", "x" * 300)
    assert demo.main([*SMALL, *options, *prompts]) == 0
    assert "eager = compiled = recomputed: yes" in capsys.readouterr().out


def test_is_compared_with_the_cpu(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = demo.GPT(demo.Config()).eval()
    prompts = [torch.tensor(list(text)) for text in (b"abc", b"de")]
    noise = torch.zeros(2, 5, demo.Config().vocab_size)
    eager = demo.generate(model, demo.decoding(model), prompts, noise)
    assert demo.same_as_cpu(model, prompts, eager, noise)
    assert "same tokens as on cpu: yes (10 tokens); logits of" in capsys.readouterr().out
    eager.tokens[1, 4] += 1
    assert not demo.same_as_cpu(model, prompts, eager, noise)
    assert "same tokens as on cpu: NO" in capsys.readouterr().out


def test_notices_another_rotary(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt.rotate", lambda x, cos, sin: x)
    assert demo.main(SMALL) == 1
    assert "eager = compiled = recomputed: NO" in capsys.readouterr().out


def test_notices_pages_of_another_sequence(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n) % (n // 3))
    assert demo.main(SMALL) == 1
    assert "eager = compiled = recomputed: NO" in capsys.readouterr().out
