"""examples/rl_consistency.py: the zero, that it is no matter of course, and its parts."""

from __future__ import annotations

import importlib
import random
import re
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ("--steps", "4", "--iterations", "2", "--prompts", "2")


@pytest.fixture
def rl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which the program sets: undone afterwards
    return importlib.import_module("rl_consistency")


def test_trainer_and_rollout_agree_and_with_sdpa_do_not(
    rl: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "build" / "rl.png"
    assert rl.main([*SMALL, "--picture", str(picture)]) == 0
    (row,) = re.findall(r"^log-probs that differ +(.*)$", capsys.readouterr().out, re.MULTILINE)
    differing, tokens = zip(
        *(map(int, cell) for cell in re.findall(r"(\d+) of (\d+)", row.replace(",", ""))),
        strict=True,
    )
    ours, sdpa = differing[::2], differing[1::2]
    assert ours == (0, 0)
    assert all(sdpa)
    assert tokens == (tokens[0],) * 4
    assert tokens[0] > 2 * 16 * 12
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_says_so_where_they_differ(
    rl: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = rl.STACKS[0]._replace(rollout="paged_sdpa", layers=nullcontext)
    monkeypatch.setattr(rl, "STACKS", (stack,))
    assert rl.main([*SMALL, "--dtype", "bfloat16"]) == 1
    assert "fa3_ops bfloat16" in capsys.readouterr().out


@pytest.fixture
def engine(rl: ModuleType) -> tuple[Any, list[Any]]:
    """An engine with too little room for all requests at once, and the sizes of its steps."""
    rl.fa3_ops.integrations.transformers.register()
    torch.manual_seed(0)
    args = rl.arguments(["--steps", "1"])
    documents = [torch.randint(256, (400,)) for _ in range(4)]
    trainer = rl.Trainer(rl.learn_to_write(documents, args), torch.float32, 1e-3)
    engine = rl.Engine(trainer.policy, attention="paged_fa3npu", slots=5, budget=20)
    steps: list[Any] = []
    step = engine._step
    engine._step = lambda batch: (steps.append([len(tokens) for _, tokens in batch]), step(batch))
    return engine, steps


def test_requests_join_and_leave_and_prompts_come_in_chunks(
    rl: ModuleType, engine: tuple[Any, list[Any]]
) -> None:
    engine, steps = engine
    requests = [rl.Request(list(range(i, 3 * i + 9)), 3 + i) for i in range(9)]
    assert engine.generate(requests) == len(steps)
    assert [len(request.tokens) for request in requests] == [3 + i for i in range(9)]
    assert [len(request.log_probs) for request in requests] == [3 + i for i in range(9)]
    assert max(map(sum, steps)) == 20  # the budget, which some prompts were cut by
    assert max(map(len, steps)) == 5
    assert any(1 in step and max(step) > 1 for step in steps)  # prompts beside generation
    assert sum(map(sum, steps)) == sum(len(r.all_tokens) - 1 for r in requests)
    pages = len(engine.free)
    assert pages == engine.k_cache[0].shape[0]
    assert len(set(engine.free)) == pages


def test_metrics_are_verls(rl: ModuleType) -> None:
    generator = random.Random(0)
    rollout = torch.tensor([-generator.expovariate(1) for _ in range(50)])
    actor = rollout + torch.tensor([generator.gauss(0, 0.01) for _ in range(50)])
    ours = rl.compare(rollout, actor)
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics
    from verl.utils.debug.metrics import calculate_debug_metrics

    mask = torch.ones(1, 50)
    data = DataProto.from_dict(
        {
            "rollout_log_probs": rollout[None],
            "old_log_probs": actor[None],
            "response_mask": mask,
            "responses": mask,
        }
    )
    theirs = calculate_debug_metrics(data)
    theirs |= {
        f"rollout_corr/{name}": value
        for name, value in compute_offpolicy_metrics(actor[None], rollout[None], mask).items()
    }
    names = [name for name in ours if "/" in name]
    assert len(names) == 6
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
