"""Memory as devices copy it by whole blocks (TMA)."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 16


def is_aligned(x: Tensor) -> bool:
    """Whether x starts at whole 16 bytes, as does every row of its last dimension."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    whole = all(step > 0 and step % BYTES == 0 for step in steps)
    return whole and x.stride(-1) == 1 and x.data_ptr() % BYTES == 0


def aligned(x: Tensor) -> Tensor:
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
