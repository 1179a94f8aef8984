"""fa3_ops registered with transformers, one thread, and nothing from a network."""

from __future__ import annotations

import os

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
import torch.nn.functional as F

import fa3_ops.integrations.transformers.registered  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose rows do not depend on how many there are: F.linear's do, in the last
    bits, and would hide what attention does."""
    linear = F.linear

    def each_row(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        rows = [linear(row, *weights) for row in x.flatten(0, -2).split(1)]
        return torch.cat(rows).unflatten(0, x.shape[:-1])

    monkeypatch.setattr(F, "linear", each_row)
    return
