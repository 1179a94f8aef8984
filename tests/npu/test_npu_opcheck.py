"""torch.library.opcheck on NPU tensors, without the utility that PyTorch has not built for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from npu_calls import on_npu
from sample_inputs import SAMPLES
from torch import Tensor
from torch.library import opcheck

UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")


def moved(x: Any, device: str) -> Any:
    return on_npu(x, device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", SAMPLES, ids=str)
def test_opcheck(op: Any, dtype: torch.dtype) -> None:
    """In float32, which plain torch serves, and in float16, which flash_attn_npu does."""
    torch.manual_seed(0)
    for args, kwargs in SAMPLES[op]():
        args, kwargs = narrowed(op, args, dtype), narrowed(op, kwargs, dtype)
        opcheck(op, args, kwargs, test_utils=UTILITIES)


def narrowed(op: Any, arguments: Any, dtype: torch.dtype, device: str = "npu") -> Any:
    """On the device; float32 tensors of the model's dtype in `dtype`."""
    keep = ("alibi_slopes", "softmax_lse", "out_partial", "lse_partial", "dsoftmax_lse")
    names = [a.name for a in op._schema.arguments]

    def one(name: str, x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == torch.float32 and name not in keep:
            x = x.detach().to(dtype).requires_grad_(x.requires_grad)
        return moved(x, device)

    if isinstance(arguments, dict):
        return {name: one(name, x) for name, x in arguments.items()}
    return tuple(one(name, x) for name, x in zip(names, arguments, strict=False))
