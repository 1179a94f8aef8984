"""torch.autocast: q, k and v take the autocast dtype, as scaled_dot_product_attention's do; with a
cache, q and the new keys and values take the cache's dtype, which is never cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda", "AutocastPrivateUse1": "npu"}
_CASTING = frozenset(_DEVICES.values())


def cast(x: Any, dtype: torch.dtype) -> Any:
    """x in dtype, if both are floating-point types of 16 or 32 bits."""
    castable = isinstance(x, Tensor) and x.dtype in _CASTABLE and dtype in _CASTABLE
    return x.to(dtype) if castable else x


def cast_training(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments as the autocast kernel will cast them, so that they can be checked before."""
    device = q.device.type
    if device not in _CASTING or not torch.is_autocast_enabled(device):
        return q, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast(x, dtype) for x in (q, *others))


def _wrap(op: Any, key: str, names: tuple[str, ...], like: str | None) -> Callable[..., Any]:
    """Casts the named arguments to the dtype of `like`, or to autocast's, and calls the op."""
    order = [a.name for a in op._schema.arguments]
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(order, args, strict=False)) | kwargs
        dtype = bound[like].dtype if like else torch.get_autocast_dtype(_DEVICES[key])
        for name in names:
            x = bound.get(name)
            # A table of another dtype than the cache's is one of float32, which rounds nothing.
            as_table = name in _TABLES and isinstance(x, Tensor) and x.dtype is not dtype
            bound[name] = cast(x, torch.float32 if as_table else dtype)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(**bound)

    return kernel


_TRAINING = ("q", "k", "v", "qv")
_CACHED = ("q", "qv")
_TABLES = ("rotary_cos", "rotary_sin")
_APPENDED = ("q", "k", "v", "qv", *_TABLES)
_ops = torch.ops.fa3npu
_library = torch.library.Library("fa3npu", "IMPL")
for _key in _DEVICES:
    for _op, _names, _like in (
        (_ops.flash_attn_func.default, _TRAINING, None),
        (_ops.flash_attn_varlen_func.default, _TRAINING, None),
        (_ops.flash_attn_varlen_func.out, _TRAINING, None),
        (_ops.flash_attn_kvcache.default, _CACHED, "k_cache"),
        (_ops.flash_attn_kvcache.out, _CACHED, "k_cache"),
        (_ops.flash_attn_with_kvcache.default, _APPENDED, "k_cache"),
        (_ops.flash_attn_with_kvcache.out, _APPENDED, "k_cache"),
    ):
        _library.impl(_op.name().removeprefix("fa3npu::"), _wrap(_op, _key, _names, _like), _key)
