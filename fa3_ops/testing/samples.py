"""Sample calls of every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fa3_ops  # noqa: F401  (registers the operators)

ops = torch.ops.fa3npu
Sample = tuple[tuple[Any, ...], dict[str, Any]]
# Tensors that are float32 beside a q of any dtype.
FLOAT32 = (
    *("alibi_slopes", "softmax_lse", "dsoftmax_lse", "out_partial", "lse_partial"),
    *("q_descale", "k_descale", "v_descale"),
)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class SampleCall:
    """One call of one operator: operator(*args, **kwargs)."""

    name: str
    operator: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def test_utils(self) -> tuple[str, ...]:
        """What torch.library.opcheck can test of this call. Its schema test compares tensors by
        arithmetic that float8 lacks; its autograd test knows three types of devices."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        eight = any(x.dtype in FLOAT8 for x in tensors)
        known = all(x.device.type in ("cpu", "cuda", "xpu") for x in tensors)
        return (
            *(() if eight else ("test_schema",)),
            *(("test_autograd_registration",) if known else ()),
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        )


def sample_calls(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[SampleCall]:
    """Some calls of every operator, the same ones every time, with tensors on the device. What has
    the dtype of q is of `dtype` in most of them; some are of 8 or 16 bits whatever it is."""
    for operator, make in SAMPLES.items():
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            samples = list(make())
        names = [a.name for a in operator._schema.arguments]
        for i, (args, kwargs) in enumerate(samples):
            named = zip(names, args, strict=False)
            yield SampleCall(
                f"{operator}-{i}".removeprefix("fa3npu."),
                operator,
                tuple(converted(name, x, device, dtype) for name, x in named),
                {name: converted(name, x, device, dtype) for name, x in kwargs.items()},
            )


def converted(name: str, x: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """An argument as it is asked for."""
    if not isinstance(x, Tensor):
        return x
    keeps = x.dtype != torch.float32 or name in FLOAT32
    return moved(x, device, x.dtype if keeps else dtype).requires_grad_(x.requires_grad)


def moved(x: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The same strides into the same memory, on the device."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
    return whole.to(device, dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def rand(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rotary(
    positions: int, rotary_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def fp8(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.float8_e4m3fn)


def flash_attn_func() -> Iterator[Sample]:
    qkv = (rand(2, 5, 4, 16, grad=True), rand(2, 9, 2, 16, grad=True), rand(2, 9, 2, 16, grad=True))
    yield qkv, {}
    yield qkv, {"causal": True, "window_size": [3, -1], "softcap": 2.0, "softmax_scale": 0.3}
    yield qkv, {"alibi_slopes": torch.rand(4), "sinks": rand(4, grad=True), "attention_chunk": 4}
    half = (
        rand(1, 3, 4, 24, dtype=torch.bfloat16),
        *(rand(1, 7, 1, 24, dtype=torch.bfloat16),) * 2,
    )
    yield half, {"qv": rand(1, 3, 4, 24, dtype=torch.bfloat16), "num_splits": 3, "pack_gqa": True}
    strided = (rand(2, 4, 5, 16).transpose(1, 2), rand(2, 9, 2, 32)[..., ::2], rand(2, 9, 2, 16))
    yield strided, {}
    descale = torch.rand(2, 2)
    eight = (fp8(2, 5, 4, 16), fp8(2, 9, 2, 16), fp8(2, 9, 2, 8))
    yield eight, {"q_descale": descale, "k_descale": descale, "v_descale": descale}


def flash_attn_varlen_func() -> Iterator[Sample]:
    q, k, v = (rand(11, 4, 16, grad=True), rand(17, 2, 16, grad=True), rand(17, 2, 8, grad=True))
    lengths = (ints(0, 5, 5, 11), ints(0, 8, 12, 17), 6, 8)
    yield (q, k, v, *lengths), {"causal": True}
    yield (q, k, v, *lengths), {"seqused_q": ints(4, 0, 6), "seqused_k": ints(8, 2, 0)}
    yield (q, k, v, *lengths), {"alibi_slopes": torch.rand(3, 4), "sinks": rand(4, grad=True)}
    dense_k = (rand(3, 9, 2, 16), rand(3, 9, 2, 8))
    yield (q, *dense_k, lengths[0], None, 6, None), {"seqused_k": ints(9, 3, 1)}
    half, eight = rand(11, 4, 16).half(), (fp8(17, 2, 16), fp8(17, 2, 8))
    yield (half, *eight, *lengths), {"k_descale": torch.rand(3, 2), "v_descale": torch.rand(2)}


def flash_attn_varlen_func_out() -> Iterator[Sample]:
    for args, kwargs in list(flash_attn_varlen_func())[:2]:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        yield detached, kwargs | {"out": torch.empty(11, 4, 8)}


def _backward_of(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sample:
    with torch.no_grad():
        out, lse = forward(*args, **kwargs)
    q, k, v, *rest = (a.detach() if isinstance(a, Tensor) else a for a in args)
    kwargs = {name: x for name, x in kwargs.items() if name != "sinks"}
    return (torch.randn_like(out), q, k, v, out, lse, *rest), kwargs


def flash_attn_func_backward() -> Iterator[Sample]:
    for args, kwargs in list(flash_attn_func())[:3]:
        yield _backward_of(ops.flash_attn_func, args, kwargs)


def flash_attn_varlen_func_backward() -> Iterator[Sample]:
    for args, kwargs in list(flash_attn_varlen_func())[:3]:
        yield _backward_of(ops.flash_attn_varlen_func, args, kwargs)


def flash_attn_kvcache() -> Iterator[Sample]:
    cache = (rand(3, 32, 2, 16), rand(3, 32, 2, 24))
    yield (rand(3, 2, 4, 16), *cache), {"cache_seqlens": ints(32, 7, 0), "causal": True}
    yield (
        (rand(2, 1, 4, 16), *cache),
        {
            "cache_seqlens": ints(30, 7),
            "cache_batch_idx": ints(2, 0),
            "cache_leftpad": ints(3, 0),
            "window_size": [4, 0],
            "num_splits": 2,
        },
    )
    yield (
        (rand(3, 2, 4, 16), *cache),
        {
            "cache_seqlens": ints(32, 7, 0),
            "causal": True,
            "attention_chunk": 8,
            "cache_start": ints(5, 0, 1030),
        },
    )
    pages = (rand(10, 4, 2, 16), rand(10, 4, 2, 16))
    table = ints(3, 7, 1, 0, 9, 2).view(2, 3)
    yield (
        (rand(5, 4, 16), *pages),
        {
            "cache_seqlens": ints(11, 5),
            "page_table": table,
            "cu_seqlens_q": ints(0, 4, 5),
            "max_seqlen_q": 4,
            "causal": True,
            "sinks": rand(4),
            "softcap": 5.0,
        },
    )
    half = rand(3, 2, 4, 16, dtype=torch.bfloat16)
    eight = tuple(x.to(torch.float8_e5m2) for x in cache)
    yield (half, *eight), {"cache_seqlens": ints(32, 7, 0), "k_descale": torch.rand(3, 2)}
    both = torch.randint(-128, 128, (10, 2, 4, 24), dtype=torch.int8).transpose(1, 2)
    yield (
        (half[:2], both[..., :16], both[..., 16:]),
        {
            "cache_seqlens": ints(11, 5),
            "page_table": table,
            "k_descale": torch.tensor([0.02, 0.03]),
            "v_descale": torch.tensor(0.02),
        },
    )


def flash_attn_kvcache_out() -> Iterator[Sample]:
    (args, kwargs), *_ = flash_attn_kvcache()
    yield args, kwargs | {"out": torch.empty(3, 2, 4, 24)}


def flash_attn_with_kvcache() -> Iterator[Sample]:
    yield from flash_attn_kvcache_as_composite()
    cache = (rand(2, 20, 2, 16), rand(2, 20, 2, 16))
    new = (rand(2, 3, 2, 16), rand(2, 3, 2, 16))
    cos, sin = rotary(32, 8)
    yield (
        (rand(2, 3, 4, 16), *cache, *new),
        {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": ints(0, 17), "causal": True},
    )
    cache, new = ((rand(2, n, 2, 16).half(), rand(2, n, 2, 16).half()) for n in (20, 3))
    yield (
        (rand(2, 3, 4, 16).half(), *cache, *new),
        {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": ints(0, 17)}
        | {"seqused_q": ints(3, 1)},
    )
    pages = (rand(10, 4, 2, 16), rand(10, 4, 2, 16))
    yield (
        (rand(5, 4, 16), *pages, rand(4, 2, 16), rand(4, 2, 16)),
        {
            "cache_seqlens": ints(2, 5),
            "page_table": ints(3, 7, 1, 0, 9, 2).view(2, 3),
            "cu_seqlens_q": ints(0, 4, 5),
            "cu_seqlens_k_new": ints(0, 3, 4),
            "max_seqlen_q": 4,
            "causal": True,
        },
    )


def flash_attn_kvcache_as_composite() -> Iterator[Sample]:
    (args, kwargs), *_ = flash_attn_kvcache()
    yield args, kwargs


def flash_attn_with_kvcache_out() -> Iterator[Sample]:
    *_, (args, kwargs) = flash_attn_with_kvcache()
    yield args, kwargs | {"out": torch.empty(5, 4, 16)}


def kvcache_append_() -> Iterator[Sample]:
    cos, sin = rotary(32, 16)
    yield (
        (rand(2, 3, 2, 16), rand(2, 3, 2, 8), rand(4, 20, 2, 16), rand(4, 20, 2, 8), ints(0, 17)),
        {"cache_batch_idx": ints(3, 1), "rotary_cos": cos, "rotary_sin": sin},
    )
    yield (
        (rand(4, 2, 16), rand(4, 2, 16), rand(10, 4, 2, 16), rand(10, 4, 2, 16), ints(2, 5)),
        {"page_table": ints(3, 7, 1, 0, 9, 2).view(2, 3), "cu_seqlens_k_new": ints(0, 3, 4)},
    )
    k, v = rand(2, 3, 2, 16).bfloat16(), rand(2, 3, 2, 8).bfloat16()
    yield (
        (k, v, *narrow_caches(torch.float8_e5m2), ints(0, 7)),
        {"k_descale": torch.tensor([[0.02, 0.5], [1.0, 2.0]]), "v_descale": torch.tensor([0.1])},
    )


def kvcache_scatter_() -> Iterator[Sample]:
    pages = rand(5, 2, 4, 24).transpose(1, 2)  # as vLLM has them
    slots = torch.tensor([3, -1, 19, 0, 8])
    yield (rand(6, 2, 16), rand(6, 2, 8), pages[..., :16], pages[..., 16:], slots), {}
    yield (
        (rand(2, 2, 16).half(), rand(2, 2, 8).half(), *narrow_caches(torch.int8), ints(7, 0)),
        {"k_descale": torch.tensor([0.02, 0.5]), "v_descale": torch.tensor(0.1)},
    )


def narrow_caches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 10, 2, 16, dtype=dtype), torch.zeros(2, 10, 2, 8, dtype=dtype)


def linear() -> Iterator[Sample]:
    yield (rand(5, 3, 24), rand(7, 24), rand(7)), {}
    yield (rand(24, 6).t(), rand(24, 40).t()), {}
    yield (
        (rand(3, 16).requires_grad_(), rand(20, 16).requires_grad_(), rand(20).requires_grad_()),
        {},
    )
    yield (rand(16).half(), rand(4, 16).half()), {}


def apply_rotary() -> Iterator[Sample]:
    cos, sin = rotary(32, 8)
    yield (rand(2, 3, 4, 16), cos, sin, ints(0, 20)), {}
    yield (rand(7, 4, 16), cos, sin, ints(0, 20), ints(0, 3, 5), False, False), {}


def flash_attn_combine() -> Iterator[Sample]:
    yield (rand(3, 2, 5, 4, 16), rand(3, 2, 5, 4)), {}
    yield (rand(3, 5, 4, 16), rand(3, 5, 4), torch.bfloat16), {}


def get_scheduler_metadata() -> Iterator[Sample]:
    yield (2, 1, 4096, 8, 2, 64, ints(4000, 7), torch.bfloat16), {"causal": True, "page_size": 16}


SAMPLES: dict[torch._ops.OpOverload, Callable[[], Iterator[Sample]]] = {
    ops.flash_attn_func.default: flash_attn_func,
    ops.flash_attn_func_backward.default: flash_attn_func_backward,
    ops.flash_attn_varlen_func.default: flash_attn_varlen_func,
    ops.flash_attn_varlen_func.out: flash_attn_varlen_func_out,
    ops.flash_attn_varlen_func_backward.default: flash_attn_varlen_func_backward,
    ops.flash_attn_with_kvcache.default: flash_attn_with_kvcache,
    ops.flash_attn_with_kvcache.out: flash_attn_with_kvcache_out,
    ops.flash_attn_kvcache.default: flash_attn_kvcache,
    ops.flash_attn_kvcache.out: flash_attn_kvcache_out,
    ops.kvcache_append_.default: kvcache_append_,
    ops.kvcache_scatter_.default: kvcache_scatter_,
    ops.linear.default: linear,
    ops.apply_rotary.default: apply_rotary,
    ops.flash_attn_combine.default: flash_attn_combine,
    ops.get_scheduler_metadata.default: get_scheduler_metadata,
}
