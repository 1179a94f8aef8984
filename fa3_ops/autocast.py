"""torch.autocast: q, k and v take the autocast dtype, as scaled_dot_product_attention's do; with a
cache, q and the new keys and values take the cache's dtype, which is never cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda", "AutocastPrivateUse1": "npu"}


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in _CASTABLE else x


def _wrap(op: Any, key: str, names: tuple[str, ...], like: str | None) -> Callable[..., Any]:
    """Casts the named arguments to the dtype of `like`, or to autocast's, and calls the op."""
    order = [a.name for a in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(order, args, strict=False)) | kwargs
        if like is None:
            dtype = torch.get_autocast_dtype(_DEVICES[key])
        else:
            dtype = bound[like].dtype
        for name in names:
            if bound.get(name) is not None:
                bound[name] = _cast(bound[name], dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op(**bound)

    return kernel


_TRAINING = ("q", "k", "v", "qv")
_CACHED = ("q", "k", "v", "qv", "rotary_cos", "rotary_sin")
_ops = torch.ops.fa3npu
_library = torch.library.Library("fa3npu", "IMPL")
for _key in _DEVICES:
    for _op, _names, _like in (
        (_ops.flash_attn_func.default, _TRAINING, None),
        (_ops.flash_attn_varlen_func.default, _TRAINING, None),
        (_ops.flash_attn_kvcache.default, _CACHED, "k_cache"),
        (_ops.flash_attn_with_kvcache.default, _CACHED, "k_cache"),
    ):
        _library.impl(_op.name().removeprefix("fa3npu::"), _wrap(_op, _key, _names, _like), _key)
