from torch import Tensor

from ._results import empty_lse, empty_out


def flash_attn_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return empty_out(q, v_cache), empty_lse(q)


def flash_attn_kvcache_out(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return empty_lse(q)
