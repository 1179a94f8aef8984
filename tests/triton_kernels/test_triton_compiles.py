"""What the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_for_cuda.py")
ATTENTION = ["attention", "combine", "prefill"]
KERNELS = [
    *("apply_rotary", "cache_writes", "flash_attn_combine"),
    *("gradients_of_keys", "gradients_of_rows", "linear", "row_terms"),
]


def compiled(what: str, cache: Path) -> list[str]:
    """The kernels, each as often as it is compiled."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, SCRIPT, what]
    printed = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert all(int(size) > 0 for _, size in lines)
    return sorted(kernel for kernel, _ in lines)


def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    assert sorted(set(compiled("samples", tmp_path))) == sorted([*KERNELS, "attention"])


def test_other_lengths_compile_nothing(tmp_path: Path) -> None:
    chunks_and_whole = ["attention", *ATTENTION]
    assert compiled("lengths", tmp_path) == sorted(KERNELS + chunks_and_whole)


def test_attention_compiles_for_an_h100(tmp_path: Path) -> None:
    assert sorted(set(compiled("attention", tmp_path))) == ATTENTION
