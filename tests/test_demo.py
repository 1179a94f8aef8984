"""The demo at a small size: it learns, and its three ways to generate agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "examples" / "train_and_generate.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_and_generates_the_same_three_ways(dtype: str) -> None:
    sizes = ("--steps", "15", "--batch", "256", "--tokens", "20")
    prompts = ("--prompt", "The statement", "--prompt", "if")
    result = run(*sizes, *prompts, "--dtype", dtype)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "eager = compiled = recomputed: yes (2 prompts x 20 tokens" in result.stdout
    before, after = map(float, re.findall(r"held out ([\d.]+) -> ([\d.]+)", result.stdout)[0])
    assert after < before - 1
    assert "--- if\nif" in result.stdout


def test_learns_from_a_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    result = run("--text", str(text), "--steps", "3", "--tokens", "4", "--prompt", "to be")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "text.txt: 1 documents" in result.stdout


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    result = run("--prompt", "x" * 512)
    assert result.returncode == 1
    assert "prompt and tokens must fit in 512" in result.stderr
