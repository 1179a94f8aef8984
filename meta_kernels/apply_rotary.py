import torch
from torch import Tensor


@torch.library.register_fake("fa3npu::apply_rotary")
def apply_rotary(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x.new_empty(x.shape)
