"""examples/rl_consistency.py on the emulated NPU: the zero, by flash_attn_npu's kernels."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import fa3_ops

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore:fa3_ops. linear served by torch")
def test_trainer_and_rollout_agree_and_with_sdpa_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    rl = importlib.import_module("rl_consistency")
    served = spy(monkeypatch)
    assert rl.main(["--device", "npu", "--steps", "1", "--iterations", "1", "--prompts", "1"]) == 0
    found = re.search(r"log-probs that differ +0 of (\d+) +(\d+) of (\d+)", capsys.readouterr().out)
    assert found is not None
    ours, differing, sdpa = map(int, found.groups())
    assert ours == sdpa
    assert ours >= 8 * 12
    assert differing > 0
    assert served == {"flash_attn_npu"}


def spy(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Who served the rollout's attention."""
    served: set[str] = set()
    attention = fa3_ops.flash_attn_with_kvcache

    def explained(*args: torch.Tensor, **given: object) -> torch.Tensor:
        served.add(fa3_ops.explain(attention, *args, **given).backend)
        return attention(*args, **given)

    monkeypatch.setattr(fa3_ops, "flash_attn_with_kvcache", explained)
    return served
