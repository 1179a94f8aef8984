"""What a model computes besides attention, on a GPU: every row as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.batch_invariant import BatchInvariantMode

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "RMSNorm": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
    "log_softmax": lambda x: x.float().log_softmax(-1),
    "silu": F.silu,
    "linear": lambda x: F.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype, device=x.device)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [32, 128, 256, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_number(name: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(257, width, device="cuda").to(dtype)
    with BatchInvariantMode():
        together = ROWS[name](x)
        for rows in (1, 2, 3, 5, 8, 16, 31, 100):
            assert torch.equal(ROWS[name](x[:rows].clone()), together[:rows]), rows
