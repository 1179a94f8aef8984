from torch import Tensor

from ._results import empty_gradients, empty_lse, empty_out


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return empty_out(q, v), empty_lse(q)


def flash_attn_func_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)
