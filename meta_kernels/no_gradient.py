from collections.abc import Sequence

import torch
from torch import Tensor


def no_gradient(gradient: Tensor, size: Sequence[int], dtype: torch.dtype, of: str) -> Tensor:
    return gradient.new_empty(size, dtype=dtype)
