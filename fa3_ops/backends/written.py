"""What a Python kernel does for the tensors that it writes; as csrc/cpu/ops/written.h."""

from __future__ import annotations

import torch
from torch import Tensor


def apart(t: Tensor, *written: Tensor) -> Tensor:
    """t, or a copy where it may share memory with what is written."""
    return t if storages(t).isdisjoint(storages(*written)) else t.clone()


def storages(*tensors: Tensor | None) -> set[int]:
    """Where the memory of tensors begins, of those that have any."""
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None} - {0}


def mark_written(*written: Tensor) -> None:
    """Raises the versions that autograd compares. Before the write: an inference tensor is refused
    outside of inference mode."""
    for t in written:
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "fa3_ops: Inplace update to inference tensor outside InferenceMode is not allowed"
            )
    torch.autograd.graph.increment_version(written)
