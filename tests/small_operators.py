"""What is checked of the operators beside attention wherever a device has kernels of its own for
them: numbers against the reference, bits against the CPU's kernels."""

from __future__ import annotations

from typing import Any

import torch
from sample_inputs import ints, rand, rotary
from strategies import RELATIVE, assert_linear
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends.triton.schedule import CHUNK

ops = torch.ops.fa3npu
CACHES = ("k_cache", "v_cache")


def run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operator returns, which must not wait for a GPU."""
    if not torch.cuda.is_available():
        return operator(*args, **kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return operator(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def copied(call: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """A call with copies of its tensors' memory: strides, surroundings and what is shared stay."""
    memory: dict[int, torch.UntypedStorage] = {}

    def copy(x: Tensor) -> Tensor:
        at = x.untyped_storage().data_ptr()
        if at not in memory:
            memory[at] = surroundings(x).to(device, copy=True).untyped_storage()
        like = torch.empty(0, dtype=x.dtype, device=device)
        return like.set_(memory[at], x.storage_offset(), x.shape, x.stride())

    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in call.items()}


def surroundings(x: Tensor) -> Tensor:
    """All memory that x is a view of, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).cpu()


def assert_bits(got: Tensor, want: Tensor) -> None:
    """NaN of any kind are equal."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=0, atol=0, equal_nan=True)


def check_linear(call: dict[str, Any], device: str) -> None:
    ours = copied(call, device)
    out = run(ops.linear, **ours)
    assert_linear(out.cpu(), call)
    for i in range(0, len(out), 60):
        alone = ops.linear(ours["x"][i : i + 1], ours["weight"], ours["bias"])
        assert torch.equal(alone[0], out[i])


def check_a_row_of_linear_is_the_same_anywhere(
    dtype: torch.dtype, columns: int, depth: int, device: str
) -> None:
    """In tiles of few, some and many rows, wherever it stands in one. Two products cancel, so that
    the roundings of the sum show in 16 bits."""
    weight, bias = rand(columns, depth, dtype=dtype), rand(columns, dtype=dtype)
    row, others = rand(depth, dtype=dtype), rand(520, depth, dtype=dtype)
    weight[:, 0] = weight[:, -1] = row[0] = 1000
    row[-1] = -1000
    weight, bias, row, others = (x.to(device) for x in (weight, bias, row, others))
    want = ops.linear(row, weight, bias)
    assert want.shape == (columns,)
    for rows, place in ((1, 0), (3, 2), (16, 15), (17, 16), (70, 65), (520, 300)):
        x = others[:rows].clone()
        x[place] = row
        assert torch.equal(ops.linear(x, weight, bias)[place], want)


def check_strides_and_neighbours_change_nothing_of_linear(dtype: torch.dtype, device: str) -> None:
    shapes = {"x": (40, 150), "weight": (130, 150)}
    plain = {name: rand(*shape, dtype=dtype).to(device) for name, shape in shapes.items()}
    want = ops.linear(**plain)
    for name, x in plain.items():
        rows, columns = x.shape
        offset = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        wide = torch.cat((x, x.new_zeros(rows, 3)), 1)[:, :columns]
        for view in (x.t().contiguous().t(), offset, wide, x.repeat_interleave(2, 1)[:, ::2]):
            assert torch.equal(ops.linear(**plain | {name: view}), want)
    for begin, end in ((0, 1), (5, 106), (97, 98)):
        part = ops.linear(plain["x"], plain["weight"][begin:end])
        assert torch.equal(part, want[:, begin:end])


def check_a_rows_gradient_is_the_same_anywhere(dtype: torch.dtype, device: str) -> None:
    shapes = ((40, 30), (70, 30), (40, 70))
    x, weight, dout = (rand(*shape, dtype=dtype).to(device) for shape in shapes)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.linear(x, weight), x, dout)
    for rows in (slice(0, 1), slice(3, 7), slice(20, 40)):
        part = x[rows].detach().requires_grad_()
        (got,) = torch.autograd.grad(ops.linear(part, weight), part, dout[rows])
        assert torch.equal(got, dx[rows])


def check_error_of_float32_at_most_twice_pytorchs(rows: int, depth: int, device: str) -> None:
    """The root of the mean square over some thousand elements, for sums around zero and for sums
    that grow."""
    torch.manual_seed(depth)
    for make in (torch.randn, torch.rand):
        x, weight = make(rows, depth), make(2048 // rows, depth)
        want = reference.linear(x, weight)
        x, weight = x.to(device), weight.to(device)
        ours, pytorchs = (
            float((y.cpu().double() - want).square().mean().sqrt())
            for y in (ops.linear(x, weight), torch.nn.functional.linear(x, weight))
        )
        assert 0 < ours <= 2 * pytorchs


def check_append(call: dict[str, Any], device: str) -> None:
    ours, cpus = copied(call, device), copied(call)
    run(ops.kvcache_append_, **ours)
    with fa3_ops.use_backend("cpu"):
        ops.kvcache_append_(**cpus)
    reference.append(**call)
    for name in CACHES:
        assert_bits(ours[name], cpus[name])
        assert torch.equal(surroundings(ours[name]), surroundings(cpus[name]))
        if "rotary_cos" not in call or name == "v_cache":
            assert_bits(ours[name], call[name])


def check_scatter(call: dict[str, Any], device: str) -> None:
    ours = copied(call, device)
    run(ops.kvcache_scatter_, **ours)
    reference.scatter(**call)
    for name in CACHES:
        assert_bits(ours[name], call[name])
        assert torch.equal(surroundings(ours[name]), surroundings(call[name]))


def check_rotary(call: dict[str, Any], device: str) -> None:
    out = run(ops.apply_rotary, **copied(call, device))
    assert out.is_contiguous()
    with fa3_ops.use_backend("cpu"):
        assert_bits(out, ops.apply_rotary(**call))
    x, cu = call["x"], call.get("cu_seqlens")
    cos, sin, first = call["rotary_cos"], call["rotary_sin"], call["rotary_seqlens"]
    want = x.clone()
    for b in range(len(first)):
        rows = want[b] if cu is None else want[int(cu[b]) : int(cu[b + 1])]
        at = int(first[b]) + torch.arange(len(rows)) * int(call["advance"])
        rows.copy_(reference.rotate(rows, cos, sin, at, call["rotary_interleaved"]))
    ulp = 2 * RELATIVE[x.dtype] if x.dtype.itemsize > 1 else 2.0**-3
    torch.testing.assert_close(out.cpu().double(), want.double(), rtol=ulp, atol=2 * ulp)


def check_combine(call: dict[str, Any], device: str) -> None:
    out, lse = run(ops.flash_attn_combine, **copied(call, device))
    with fa3_ops.use_backend("cpu"):
        like_out, like_lse = ops.flash_attn_combine(**call)
    assert (out.dtype, out.stride(), lse.stride()) == (
        like_out.dtype,
        like_out.stride(),
        like_lse.stride(),
    )
    parts, lses = call["out_partial"].double(), call["lse_partial"].double()
    lses = lses.masked_fill(lses == float("inf"), float("-inf"))
    want_lse = lses.logsumexp(0)
    weights = (lses - want_lse).exp().nan_to_num(0.0)[..., None]
    want = (parts.masked_fill(weights == 0, 0.0) * weights).sum(0)
    rtol = RELATIVE[out.dtype]
    torch.testing.assert_close(out.cpu().double(), want, rtol=rtol, atol=3e-6)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-6, atol=3e-6)


def check_appends_leave_out_what_has_no_place(device: str) -> None:
    """Lengths, entries, page ids and offsets that the CPU refuses."""
    far = 2**31 - 1
    pages, new = rand(4, 2, 3, 8), rand(3, 2, 3, 8)
    call: dict[str, Any] = {"k": new, "v": -new, "k_cache": pages, "v_cache": pages.clone()}
    call["page_table"] = ints(0, 1, 9, -7, 2, far).view(3, 2)
    call |= {"cache_seqlens": ints(3, -1, 1), "cache_batch_idx": ints(0, 2, 1)}
    ours = copied(call, device)
    run(ops.kvcache_append_, **ours)
    want = pages.clone()
    want[1, 1] = new[0, 0]  # after which the cache is full
    want[2, 0] = new[1, 1]  # the row before it would lie before the cache
    assert_bits(ours["k_cache"], want)

    cache, new = rand(3, 4, 3, 8), rand(5, 3, 8)
    call = {"k": new, "v": -new, "k_cache": cache, "v_cache": cache.clone()}
    call |= {"cache_seqlens": ints(1, far, 2), "cache_batch_idx": ints(2, 0, 3)}
    ours = copied(call | {"cu_seqlens_k_new": ints(1, 3, 4, 99)}, device)
    run(ops.kvcache_append_, **ours)
    want = cache.clone()
    want[2, 1:3] = new[1:3]
    assert_bits(ours["k_cache"], want)
    want[2, 1:3] = -new[1:3]
    assert_bits(ours["v_cache"], want)


def check_scatters_leave_out_what_has_no_place(device: str) -> None:
    cache, new = rand(3, 4, 2, 8), rand(5, 2, 8)
    for dtype in (torch.int32, torch.int64):
        slots = torch.tensor([12, torch.iinfo(dtype).max, 11, -1, torch.iinfo(dtype).min])
        call = {"k": new, "v": new, "k_cache": cache, "v_cache": cache.clone()}
        ours = copied(call | {"slot_mapping": slots.to(dtype)}, device)
        run(ops.kvcache_scatter_, **ours)
        want = cache.clone()
        want[2, 3] = new[2]
        assert_bits(ours["k_cache"], want)


def check_positions_are_bounded_by_the_tables(device: str) -> None:
    x, (cos, sin) = rand(2, 3, 2, 8), rotary(20, 8)
    far = ints(-5, 2**31 - 2)
    got = ops.apply_rotary(*(t.to(device) for t in (x, cos, sin, far)), None, False, False)
    with fa3_ops.use_backend("cpu"):
        assert_bits(got, ops.apply_rotary(x, cos, sin, ints(0, 19), None, False, False))
    ops.apply_rotary(*(t.to(device) for t in (x, cos, sin, far)))
    packed = (x.flatten(0, 1), cos, sin, far, ints(4, 2, 99))  # which falls, and ends behind x
    assert ops.apply_rotary(*(t.to(device) for t in packed)).shape == (6, 2, 8)


def check_every_number(dtype: torch.dtype, cache_dtype: torch.dtype, device: str) -> None:
    """All 65536 of a 16-bit dtype, divided by two descales."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 8, 512)
    cache = torch.zeros(len(x), 1, 8, 512, dtype=torch.int8).view(cache_dtype)
    call = {"k": x, "v": x, "k_cache": cache, "v_cache": cache.clone()}
    call |= {"k_descale": torch.tensor([1.0, 0.37] * 4), "slot_mapping": torch.arange(len(x))}
    ours = copied(call, device)
    run(ops.kvcache_scatter_, **ours)
    want = reference.narrowed(x, cache_dtype, call["k_descale"])
    assert_bits(ours["k_cache"][:, 0], want)


def check_new_keys_may_lie_in_the_cache(device: str) -> None:
    cache = rand(2, 9, 2, 16)
    for rows in (slice(0, 4), slice(3, 7)):
        k_cache, v_cache = (cache.clone().to(device) for _ in range(2))
        ops.kvcache_append_(
            k_cache[:, rows], v_cache[:, rows], k_cache, v_cache, ints(2, 5).to(device)
        )
        want = cache.clone()
        want[0, 2:6], want[1, 5:9] = cache[0, rows], cache[1, rows]
        assert_bits(k_cache, want)
        assert_bits(v_cache, want)


def check_appended_keys_have_the_bits_of_apply_rotary(dtype: torch.dtype, device: str) -> None:
    k, tables = rand(2, 3, 5, 300, dtype=dtype).to(device), rotary(50, 220)
    cos, sin = (t.to(device) for t in tables)
    first = ints(7, 40).to(device)
    for interleaved in (True, False):
        k_cache, v_cache = (torch.zeros_like(k) for _ in range(2))
        ops.kvcache_append_(
            *(k, k, k_cache, v_cache, ints(0, 0).to(device), None, None, None),
            *(cos, sin, first, interleaved),
        )
        rotated = ops.apply_rotary(k, cos, sin, first, None, interleaved)
        assert torch.equal(k_cache, rotated)
        assert torch.equal(v_cache, k)
        assert not torch.equal(rotated, k)


def check_a_write_raises_the_versions(device: str) -> None:
    cache, new = rand(2, 9, 2, 16).to(device), rand(2, 2, 16).to(device)
    before = cache._version
    ops.kvcache_scatter_(new, new, cache, cache.clone(), torch.tensor([0, 3], device=device))
    assert cache._version > before


def check_rows_are_merged_alone(device: str) -> None:
    """A row has the same bits in any batch, whatever its neighbours are."""
    parts, lses = rand(5, 3, 7, 4, 40).to(device), rand(5, 3, 7, 4).to(device)
    out, lse = ops.flash_attn_combine(parts, lses)
    for b, i, h in ((0, 0, 0), (1, 3, 2), (2, 6, 3)):
        at = (slice(None), slice(b, b + 1), slice(i, i + 1), slice(h, h + 1))
        alone, lse_alone = ops.flash_attn_combine(parts[at], lses[at])
        assert torch.equal(alone, out[at[1:]])
        assert torch.equal(lse_alone, lse[at[1:]])
    parts, lses = (torch.stack((x, x), -1)[..., 0] for x in (parts, lses))  # strided
    assert all(
        torch.equal(*pair)
        for pair in zip(ops.flash_attn_combine(parts, lses), (out, lse), strict=True)
    )


def check_metadata(device: str) -> None:
    """How many chunks the keys of each sequence have; 0 for the padding behind two sequences."""
    leftpad = {"cu_seqlens_k_new": ints(0, 1, 1, 9), "cache_leftpad": ints(0, 1, 5)}
    for seqlens, more, keys in (
        (ints(0, 1, 1024, 1025), {"max_seqlen_k_new": 1}, (1, 2, 0, 0)),
        (ints(9, 1024, 0, 1025, 0, 77, 0, -5)[1::2], {}, (1024, 1025, 0, 0)),
        (ints(1024, 1025, 77), leftpad, (1025, 1024, 0)),
        (ints(2, 3), {"cache_leftpad": ints(5000, 3)}, (0, 0)),
    ):
        call = copied({"cache_seqlens": seqlens, **more}, device)
        got = run(fa3_ops.get_scheduler_metadata, 2, 1, 2048, 8, 2, 64, **call)
        assert got.dtype == torch.int32
        assert got.tolist() == [-(-n // CHUNK) for n in keys]
