"""torch.autocast: q, k and v take the autocast dtype, as scaled_dot_product_attention's do; with a
cache, q and the new keys and values take the cache's dtype, which is never cast, unless it is one
of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_ops.ops.checks import NARROW
from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import bind

_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastPrivateUse1")
_TABLES = ("rotary_cos", "rotary_sin")


def _device(key: str) -> str:
    """The type of the key's device; PrivateUse1 gets its name from whoever takes it."""
    name = key.removeprefix("Autocast").lower()
    return torch._C._get_privateuse1_backend_name() if name == "privateuse1" else name


def cast(x: Any, dtype: torch.dtype) -> Any:
    """x in dtype, if both are floating-point types of 16 or 32 bits."""
    castable = isinstance(x, Tensor) and x.dtype in _CASTABLE and dtype in _CASTABLE
    return x.to(dtype) if castable else x


def cast_training(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments as the autocast kernel will cast them, so that they can be checked before."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which has none, and would raise
        return q, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast(x, dtype) for x in (q, *others))


def _casting(op: Any, key: str, names: tuple[str, ...], like: str | None) -> Callable[..., Any]:
    """Casts the named arguments to the dtype of `like`, or to autocast's, and calls the op. Beside
    a narrow cache they take autocast's, too."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = bind(op, args, kwargs)
        dtype = given[like].dtype if like else None
        if dtype is None or dtype in NARROW:
            dtype = torch.get_autocast_dtype(_device(key))
        for name in names:
            x = given.get(name)
            # A table of another dtype than the cache's is one of float32, which rounds nothing.
            as_table = name in _TABLES and isinstance(x, Tensor) and x.dtype is not dtype
            given[name] = cast(x, torch.float32 if as_table else dtype)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(**given)

    return kernel


def register() -> None:
    ops = torch.ops.fa3npu
    training = ("q", "k", "v", "qv")
    appended = ("q", "k", "v", "qv", *_TABLES)
    for key in _KEYS:
        for op, names, like in (
            (ops.flash_attn_func.default, training, None),
            (ops.flash_attn_varlen_func.default, training, None),
            (ops.flash_attn_varlen_func.out, training, None),
            (ops.flash_attn_kvcache.default, ("q", "qv"), "k_cache"),
            (ops.flash_attn_kvcache.out, ("q", "qv"), "k_cache"),
            (ops.linear.default, ("x", "weight", "bias"), None),
            (ops.flash_attn_with_kvcache.default, appended, "k_cache"),
            (ops.flash_attn_with_kvcache.out, appended, "k_cache"),
        ):
            implement(op, _casting(op, key, names, like), key)
