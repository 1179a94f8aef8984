"""Calls like earlier ones: repeat_calls.py, which serves CPU tensors as CUDA's are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from sample_inputs import ints, rand

from fa3_ops.backends import repeated
from fa3_ops.backends.triton.narrow import in_pairs

SCRIPT = Path(__file__).with_name("repeat_calls.py")
ELSEWHERE = SCRIPT.with_name("repeat_elsewhere.py")


def printed(what: str, cache: Path, interpret: bool, script: Path = SCRIPT) -> list[str]:
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    if not interpret:
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "ignore", script, what]
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


def test_what_was_decided_does_not_outlive_its_reasons(tmp_path: Path) -> None:
    held = printed("", tmp_path, interpret=True, script=ELSEWHERE)
    checks = re.findall(r"^def (a_\w+)", ELSEWHERE.read_text(), re.MULTILINE)
    assert held == checks


def test_pairs_of_bytes_lie_where_the_bytes_do() -> None:
    """Wherever their storage begins: the strides of calls of one kind are the same."""
    odd = torch.frombuffer(bytearray(400), dtype=torch.int8, offset=1)
    assert odd.data_ptr() % 2 == 1
    for first in (1, 3):
        x = odd[first : first + 384].view(4, 6, 2, 8)[:, ::2]
        pairs = in_pairs(x)
        assert pairs.data_ptr() == x.data_ptr()
        assert pairs.stride() == (48, 16, 4, 1)


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

    def test_is_another_when_all_is_forgotten(self) -> None:
        x = rand(2, 3)
        before = repeated.key_of((x,))
        repeated.forget()
        assert repeated.key_of((x,)) != before

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
