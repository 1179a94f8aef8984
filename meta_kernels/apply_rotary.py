from torch import Tensor


def apply_rotary(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x.new_empty(x.shape)
