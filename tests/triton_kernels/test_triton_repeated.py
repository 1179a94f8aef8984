"""Calls like earlier ones: repeat_calls.py, which serves CPU tensors as CUDA's are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from sample_inputs import ints, rand

from fa3_ops.backends import repeated

SCRIPT = Path(__file__).with_name("repeat_calls.py")


def printed(what: str, cache: Path, interpret: bool) -> list[str]:
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    if not interpret:
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "ignore", SCRIPT, what]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()


def test_kernels_get_what_they_were_compiled_for(tmp_path: Path) -> None:
    starts, *wrong = printed("start", tmp_path, interpret=False)
    assert int(starts.split()[0]) > 100
    assert wrong == []


def test_it_would_be_seen_if_alignment_were_forgotten(tmp_path: Path) -> None:
    _, *wrong = printed("start-unaligned", tmp_path, interpret=False)
    assert any("cache_writes: k *fp16" in line for line in wrong)
    assert any("attention: q *fp16" in line for line in wrong)


def test_repeated_calls_have_the_results_of_first_ones(tmp_path: Path) -> None:
    assert printed("compute", tmp_path, interpret=True) == ["equal", "0 tensors kept"]


class TestKey:
    def test_is_the_same_wherever_tensors_lie(self) -> None:
        assert repeated.key_of((rand(2, 3), 1, None)) == repeated.key_of((rand(2, 3), 1, None))

    def test_has_all_that_decides(self) -> None:
        x = rand(4, 8)
        others = (
            *(x[:3], x[:, :7].contiguous(), x.T.contiguous().T, x.half(), x.flatten()[1:29]),
            *(torch._neg_view(x), ints(1), None, (1, 2)),
        )
        keys = {repeated.key_of((y,)) for y in (x, *others)}
        assert len(keys) == 1 + len(others)

    def test_counts_where_memory_begins(self) -> None:
        x = rand(100)
        keys = [repeated.key_of((x[i : i + 8],)) for i in range(8)]
        assert len(set(keys[:4])) == 4
        assert keys[4:] == keys[:4]


def test_what_is_kept_is_bounded() -> None:
    kept: repeated.Kept[int] = repeated.Kept()
    for i in range(3 * repeated.MOST):
        kept.keep(i, i)
        assert kept.get(i) == i
    assert len(kept.found) <= repeated.MOST
    repeated.forget()
    assert kept.get(i) is None
