"""fa3_ops registered with transformers, one thread, and nothing from a network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch

import fa3_ops.integrations.transformers.registered  # noqa: F401
from fa3_ops.batch_invariant import BatchInvariantMode

torch.set_num_threads(1)


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    """Products and activations whose rows do not depend on the others', as attention's do not."""
    with BatchInvariantMode():
        yield
