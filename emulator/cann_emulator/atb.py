"""Operators of ATB, Ascend's transformer library, as torch_npu offers them in torch.ops.atb.

torch_npu calls ATB through C++ classes without public headers, so these take the place of its
kernels one step above. The other operators of ATB fail by their names.
"""

from collections.abc import Callable

import torch


def _require(op: str, rules: dict[str, bool]) -> None:
    for rule, holds in rules.items():
        if not holds:
            raise RuntimeError(f"atb::{op}: {rule}")


def _on_stream(kernel: Callable[..., None], *arguments: object) -> None:
    """Runs a kernel over the bytes of the npu tensors among its arguments, as a launch would."""
    from .runtime import host, submit

    on_host = [host(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    submit(lambda: kernel(*on_host))


def _write_slots(tokens: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    rows = cache.flatten(0, 1)
    # Last to first: for a slot that occurs twice nothing is promised.
    for token, slot in reversed(list(enumerate(slots.tolist()))):
        if slot >= rows.shape[0]:
            raise IndexError(f"atb::_npu_reshape_and_cache: slot {slot} of {rows.shape[0]}")
        if slot >= 0:
            rows[slot] = tokens[token]


def reshape_and_cache(key, value, key_cache, value_cache, slot_indices) -> None:
    """key and value (tokens, nheads, headdim) into a paged cache (pages, page_size, nheads,
    headdim), each at its slot, page * page_size + offset. Slots below 0 are padding."""
    tokens = slot_indices.shape[0]
    pairs = ((key, key_cache), (value, value_cache))
    _require(
        "_npu_reshape_and_cache",
        {
            "key and value must be (tokens, nheads, headdim), the caches (pages, page_size, nheads,"
            " headdim)": all(
                x.dim() == 3 and cache.dim() == 4 and x.shape[1:] == cache.shape[2:]
                for x, cache in pairs
            ),
            "key, value and the caches must have one dtype": len(
                {x.dtype for pair in pairs for x in pair}
            )
            == 1,
            "the caches must be contiguous": all(cache.is_contiguous() for _, cache in pairs),
            "slot_indices must be (tokens,) int32": slot_indices.dtype == torch.int32
            and key.shape[0] == value.shape[0] == tokens,
        },
    )
    for x, cache in pairs:
        _on_stream(_write_slots, x, cache, slot_indices)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> None:
    """Rotates x (tokens, nheads, headdim) in place, in float32."""
    pairs = x.float().unflatten(-1, (2, -1) if is_neox_style else (-1, 2))
    first, second = pairs.unbind(-2 if is_neox_style else -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    x.copy_(torch.stack(rotated, dim=-2 if is_neox_style else -1).flatten(-2))


def _rotate_both(positions, query, key, head_size, cos_sin_cache, is_neox_style) -> None:
    cos, sin = cos_sin_cache[positions].float().chunk(2, dim=-1)
    for x in (query, key):
        _rotate(x.view(x.shape[0], -1, head_size), cos, sin, is_neox_style)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox_style=True) -> None:
    """Rotates query and key (tokens, nheads * head_size) in place. A row of cos_sin_cache
    (positions, head_size) has the cosines of a position, then its sines; element i is rotated with
    i + head_size / 2 (is_neox_style), or 2 i with 2 i + 1."""
    _require(
        "_npu_rotary_embedding",
        {
            "query and key must be (tokens, nheads * head_size), contiguous": all(
                x.dim() == 2 and x.is_contiguous() and x.shape[1] % head_size == 0
                for x in (query, key)
            ),
            "positions must have one entry for each token": positions.dim() == 1
            and positions.shape[0] == query.shape[0] == key.shape[0],
            "cos_sin_cache must be (positions, head_size)": cos_sin_cache.dim() == 2
            and cos_sin_cache.shape[1] == head_size,
            "query, key and cos_sin_cache must have one dtype, but that float16 may have a float32"
            " cos_sin_cache": query.dtype == key.dtype
            and (query.dtype, cos_sin_cache.dtype)
            in ((query.dtype, query.dtype), (torch.float16, torch.float32)),
        },
    )
    _on_stream(_rotate_both, positions, query, key, head_size, cos_sin_cache, is_neox_style)


def _add_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    out += x.float().T @ weight.float()


def matmul_add_fp32(x, weight, out) -> None:
    """out (m, n) float32 += xᵀ weight, of x (k, m) and weight (k, n)."""
    _require(
        "_npu_matmul_add_fp32",
        {
            "x must be (k, m), weight (k, n) and out (m, n)": x.dim() == weight.dim() == 2
            and x.shape[0] == weight.shape[0]
            and out.shape == (x.shape[1], weight.shape[1]),
            "out must be float32": out.dtype == torch.float32,
        },
    )
    _on_stream(_add_product, x, weight, out)


_library = torch.library.Library("atb", "IMPL")


def install() -> None:
    kernels = {
        "_npu_reshape_and_cache": reshape_and_cache,
        "_npu_rotary_embedding": rotary_embedding,
        "_npu_matmul_add_fp32": matmul_add_fp32,
    }
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "PrivateUse1", allow_override=True)
