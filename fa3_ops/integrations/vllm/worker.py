"""The worker of a batch-invariant engine: vLLM's, with our products and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.determinism import batch_invariant as triton
from vllm.model_executor.layers import utils as layers
from vllm.v1.worker.cpu_worker import CPUWorker

from fa3_ops import batch_invariant


class BatchInvariantWorker(CPUWorker):
    def init_device(self) -> None:
        # which would give PyTorch's products over to kernels in Triton
        with _replaced(triton, "init_batch_invariance", _nothing):
            super().init_device()

    def load_model(self, **named: Any) -> None:
        dispatch = _dispatch(layers.dispatch_cpu_unquantized_gemm)
        with _replaced(layers, "dispatch_cpu_unquantized_gemm", dispatch):
            super().load_model(**named)

    def execute_model(self, *arguments: Any) -> Any:
        with batch_invariant.BatchInvariantMode():
            return super().execute_model(*arguments)

    def sample_tokens(self, *arguments: Any) -> Any:
        with batch_invariant.BatchInvariantMode():
            return super().sample_tokens(*arguments)


def _nothing() -> None:
    pass


def _dispatch(packed: Callable[[torch.nn.Module, bool], None]) -> Callable[..., None]:
    """What vLLM calls for each layer with a weight that it has loaded: it would pack the weight and
    remove it, and multiply by kernels of its own."""

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            layer.cpu_linear = batch_invariant.linear
        else:  # of convolutions
            packed(layer, remove_weight)

    return dispatch


@contextmanager
def _replaced(module: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
