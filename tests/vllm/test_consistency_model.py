"""Training equals inference: log-probabilities of vLLM's rollout and of transformers' trainer, by
`python -m fa3_ops consistency --model` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_models import make

SMALL = ("--sequences", "8", "--new-tokens", "8")


def run(model: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "fa3_ops", "consistency", "--model", str(model), *SMALL]
    ended = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
    print(ended.stdout)
    return ended.returncode, ended.stdout


def differing(printed: str) -> dict[str, int]:
    """How many elements of each kind of layer differ."""
    lines = [line.split("|") for line in printed.splitlines() if " of " in line and "|" in line]
    return {cells[1].strip(): int(cells[2].split()[0]) for cells in lines}


def test_training_equals_inference(folder: Path) -> None:
    status, printed = run(make("qwen3", folder), "--dtype", "float32", "--dtype", "bfloat16")
    assert status == 0
    assert printed.count("rollout by vLLM") == 2
    assert printed.count("log-probabilities: 0 of 64 differ\n") == 2
    layers = differing(printed)
    assert len(layers) == 20
    assert set(layers.values()) == {0}


def test_without_our_operators_it_does_not(folder: Path) -> None:
    """vLLM rounds elsewhere: what the tool is to find."""
    status, printed = run(make("qwen3", folder), "--dtype", "bfloat16", "--stock")
    assert status == 1
    layers = differing(printed)
    assert layers["what model.norm takes"] == layers["log_softmax"] == 0
    assert layers["model.layers.*.post_attention_layernorm"] > 0
    assert layers["queries and keys of model.layers.*.self_attn"] > 0
