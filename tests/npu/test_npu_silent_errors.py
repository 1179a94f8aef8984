"""What flash_attn_npu accepts and silently gets wrong, one test each: the kernel's own function
gives a wrong number, ours the right one. The numbers are those of docs/npu.md."""

from __future__ import annotations

from typing import Any

import flash_attn_npu_3 as theirs
import pytest
import torch
from npu_calls import assert_close, assert_lse, to_npu
from sample_inputs import ints, rand
from torch import Tensor

import fa3_ops
from fa3_ops import reference

HALF = torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def wrong(out: Tensor, softmax_lse: Tensor, want: Tensor, want_lse: Tensor) -> bool:
    """Whether a result is further from the truth than rounding can take it."""
    out, lse = out.cpu().double(), softmax_lse.cpu().double()
    if out.shape != want.shape or lse.shape != want_lse.shape:
        return True
    bad_out = (out - want).abs().max() > 0.05 or bool(out.isnan().any())
    bad_lse = not torch.equal(lse.isinf(), want_lse.isinf()) or not torch.equal(
        lse == float("inf"), want_lse == float("inf")
    )
    return bool(bad_out) or bad_lse or bool((lse - want_lse).nan_to_num(0.0).abs().max() > 0.05)


def show(
    name: str,
    call: dict[str, Any],
    unseen_by_reference: tuple[str, ...] = ("max_seqlen_q", "max_seqlen_k", "num_splits"),
) -> None:
    """Theirs is wrong, ours is right."""
    kvcache = name == "flash_attn_with_kvcache"
    flag = {"return_softmax_lse" if kvcache else "return_attn_probs": True}
    plain = {k: v for k, v in call.items() if k not in unseen_by_reference}
    truth = reference.flash_attn_with_kvcache if kvcache else reference.batched
    want, want_lse = truth(**{k: clone(v) for k, v in plain.items()})
    out, softmax_lse, *_ = getattr(theirs, name)(**to_npu(call), **flag)
    assert wrong(out, softmax_lse, want, want_lse)
    out, softmax_lse = getattr(fa3_ops, name)(**to_npu(call), **flag)
    assert_close(out, want, HALF)
    assert_lse(softmax_lse, want_lse, HALF)


def clone(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def cache(*shape: int) -> dict[str, Tensor]:
    return {"k_cache": rand(*shape, dtype=HALF), "v_cache": rand(*shape, dtype=HALF)}


def paged(kv_lens: list[int], page_size: int = 16, heads_k: int = 2, d: int = 64) -> dict[str, Any]:
    per_row = max(1, -(-max(kv_lens) // page_size))
    pages = len(kv_lens) * per_row
    return {
        **cache(pages, page_size, heads_k, d),
        "page_table": torch.randperm(pages).int().view(len(kv_lens), per_row),
        "cache_seqlens": ints(*kv_lens),
    }


def packed_q(q_lens: list[int], heads: int = 4, d: int = 64, behind: int = 0) -> dict[str, Any]:
    return {
        "q": rand(sum(q_lens) + behind, heads, d, dtype=HALF),
        "cu_seqlens_q": torch.tensor([0, *q_lens]).cumsum(0).int(),
        "max_seqlen_q": max(q_lens),
    }


def test_1_cache_batch_idx_is_read_by_nothing() -> None:
    q = rand(2, 1, 4, 64, dtype=HALF)
    call = {"q": q, **cache(2, 32, 2, 64), "cache_batch_idx": ints(1, 0)}
    show("flash_attn_with_kvcache", call)


def test_2_qv_is_ignored_but_changes_the_scale() -> None:
    q, qv = rand(2, 1, 4, 64, dtype=HALF), rand(2, 1, 4, 64, dtype=HALF)
    show("flash_attn_with_kvcache", {"q": q, "qv": qv, **cache(2, 32, 2, 64)})


def test_3_seqused_q_is_ignored() -> None:
    call = {
        **packed_q([5, 6]),
        "k": rand(30, 2, 64, dtype=HALF),
        "v": rand(30, 2, 64, dtype=HALF),
        "cu_seqlens_k": ints(0, 12, 30),
        "max_seqlen_k": 18,
        "seqused_q": ints(2, 6),
        "causal": True,
    }
    show("flash_attn_varlen_func", call)


def test_3_cu_seqlens_k_new_and_v_without_k() -> None:
    q, v = rand(2, 1, 4, 64, dtype=HALF), rand(2, 1, 2, 64, dtype=HALF)
    call = {"q": q, **cache(2, 32, 2, 64), "v": v, "cache_seqlens": ints(32, 32)}
    device = to_npu(call)
    theirs.flash_attn_with_kvcache(**device)
    assert torch.equal(device["v_cache"].cpu(), call["v_cache"])  # no append, no word
    with pytest.raises(ValueError, match="v must come with new keys k"):
        fa3_ops.flash_attn_with_kvcache(**to_npu(call))

    ragged = {
        **packed_q([1, 1, 1]),
        **paged([3, 20, 30]),
        "k": rand(4, 2, 64, dtype=HALF),
        "v": rand(4, 2, 64, dtype=HALF),
        "cu_seqlens_k_new": ints(0, 1, 3, 4),
        "causal": True,
    }
    ragged["cache_seqlens"] = ints(2, 17, 28)
    device = to_npu(ragged)
    out, softmax_lse = fa3_ops.flash_attn_with_kvcache(**device, return_softmax_lse=True)
    ragged.pop("max_seqlen_q")
    want, want_lse = reference.flash_attn_with_kvcache(**ragged)  # appends to the CPU's caches
    assert_close(out, want, HALF)
    assert_lse(softmax_lse, want_lse, HALF)
    assert torch.equal(device["k_cache"].cpu(), ragged["k_cache"])


def test_4_seqused_k_beside_cu_seqlens_k() -> None:
    call = {
        **packed_q([4, 3]),
        "k": rand(110, 2, 64, dtype=HALF),
        "v": rand(110, 2, 64, dtype=HALF),
        "cu_seqlens_k": ints(0, 50, 110),
        "max_seqlen_k": 60,
        "seqused_k": ints(30, 45),
        "causal": True,
    }
    show("flash_attn_varlen_func", call)


@pytest.mark.parametrize("lengths", [(40, 40), (30, 64)], ids=str)
def test_5_a_dense_cache_that_is_not_full(lengths: tuple[int, int]) -> None:
    q = rand(2, 3, 4, 64, dtype=HALF)
    call = {"q": q, **cache(2, 64, 2, 64), "cache_seqlens": ints(*lengths), "causal": True}
    show("flash_attn_with_kvcache", call)


def test_6_packed_q_over_a_dense_cache() -> None:
    call = {**packed_q([2, 3]), **cache(2, 64, 2, 64), "cache_seqlens": ints(40, 50)}
    show("flash_attn_with_kvcache", call | {"causal": True})


def test_7_strides_of_a_cache() -> None:
    call = {"q": rand(2, 2, 4, 64, dtype=HALF), **cache(2, 80, 2, 64), "causal": True}
    for name in ("k_cache", "v_cache"):
        call[name] = call[name][:, :64]
    show("flash_attn_with_kvcache", call)


def test_7_strides_of_a_paged_cache_that_holds_keys_beside_values() -> None:
    both = rand(12, 2, 16, 2, 64, dtype=HALF)
    call = {**packed_q([1, 1]), **paged([60, 70]), "causal": True}
    call |= {"k_cache": both[:, 0], "v_cache": both[:, 1]}
    show("flash_attn_with_kvcache", call)


def test_7_strides_of_a_page_table() -> None:
    call = {**packed_q([1, 1]), **paged([60, 70]), "causal": True}
    wide = torch.zeros(2, 9, dtype=torch.int32)
    wide[:, :5] = call["page_table"]
    call["page_table"] = wide[:, :5]
    show("flash_attn_with_kvcache", call)


def test_8_the_storage_offset_in_backward() -> None:
    base = rand(3, 9, 2, 64, dtype=HALF).npu()

    def dq(function: Any) -> Tensor:
        q = base[1:].detach().requires_grad_()
        k, v = base[:2].detach().clone(), base[1:].detach().clone()
        return torch.autograd.grad(function(q, k, v, causal=True).sum(), q)[0].cpu().double()

    cpu = base.cpu().double()
    q = cpu[1:].requires_grad_()
    out, _ = reference.batched(q, cpu[:2].detach(), cpu[1:].detach(), causal=True)
    (want,) = torch.autograd.grad(out.sum(), q)
    assert (dq(theirs.flash_attn_func) - want).abs().max() > 0.05
    torch.testing.assert_close(dq(fa3_ops.flash_attn_func), want, rtol=0.02, atol=0.02)


def test_9_headdim_v_is_taken_for_headdim() -> None:
    call = {"q": rand(1, 2, 2, 64, dtype=HALF), "k": rand(1, 40, 1, 64, dtype=HALF)}
    show("flash_attn_func", call | {"v": rand(1, 40, 1, 128, dtype=HALF), "causal": True})


def test_10_metadata_of_other_lengths() -> None:
    """The splits are baked in. Ours says NaN: see also test_npu_capture.py."""
    call = {**packed_q([1], 2, 16), **paged([1500], 128, 1, 16), "causal": True}
    device = to_npu(call)
    shape = (1, 1, 1536, 2, 1, 16)
    options = {"cu_seqlens_q": device["cu_seqlens_q"], "page_size": 128, "causal": True}
    made = theirs.get_scheduler_metadata(*shape, device["cache_seqlens"], HALF, **options)
    ours = fa3_ops.get_scheduler_metadata(*shape, device["cache_seqlens"], HALF, **options)
    device["cache_seqlens"] = ints(600).npu()  # two splits of three blocks are gone
    call["cache_seqlens"] = ints(600)
    plain = {k: v for k, v in call.items() if k != "max_seqlen_q"}
    want, want_lse = reference.flash_attn_with_kvcache(**plain)
    out, softmax_lse, *_ = theirs.flash_attn_with_kvcache(
        **device, scheduler_metadata=made, return_softmax_lse=True
    )
    assert wrong(out, softmax_lse, want, want_lse)
    out = fa3_ops.flash_attn_with_kvcache(**device, scheduler_metadata=ours)
    assert out.cpu().isnan().all()


@pytest.mark.parametrize("keys", [4, 9])
def test_11_rows_that_see_no_key(keys: int) -> None:
    call = {**packed_q([10]), **paged([keys]), "causal": True}
    show("flash_attn_with_kvcache", call)


def test_12_flash_decode_and_rows_that_see_no_key() -> None:
    call = {**packed_q([3, 3], 2, 16), **paged([1030, 1], 128, 1, 16), "causal": True}
    show("flash_attn_with_kvcache", call)


def test_13_flash_decode_and_a_sequence_without_keys() -> None:
    call = {**packed_q([1, 1], 2, 16), **paged([1030, 0], 128, 1, 16), "causal": True}
    show("flash_attn_with_kvcache", call | {"num_splits": 1})


def test_14_a_sequence_without_keys_overwrites_the_lse_of_others() -> None:
    call = {**packed_q([1, 1, 1], 8, 16), **paged([20, 0, 30], 16, 1, 16), "causal": True}
    show("flash_attn_with_kvcache", call)


def test_15_rows_behind_the_last_sequence_shift_the_lse() -> None:
    """A padded batch: the heads of softmax_lse lie cu_seqlens_q[-1] apart, not total_q."""
    call = {**packed_q([2, 3], behind=3), **paged([20, 30]), "causal": True}
    show("flash_attn_with_kvcache", call)


@pytest.mark.parametrize("window", [(0, -1), (0, 5), (-1, 2)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
def test_16_a_window_over_fewer_keys_than_rows(window: tuple[int, int], layout: str) -> None:
    """The longest k stands for a right side past it, or none for that: the first rows notice."""
    if layout == "paged":
        call = {**packed_q([6, 5]), **paged([2, 1]), "window_size": window}
        show("flash_attn_with_kvcache", call)
    elif layout == "packed":
        keys = {name: rand(3, 2, 64, dtype=HALF) for name in "kv"}
        lengths = {"cu_seqlens_k": ints(0, 2, 3), "max_seqlen_k": 2}
        show("flash_attn_varlen_func", packed_q([6, 5]) | keys | lengths | {"window_size": window})
    else:
        keys = {name: rand(2, 2, 2, 64, dtype=HALF) for name in "kv"}
        q = rand(2, 6, 4, 64, dtype=HALF)
        show("flash_attn_func", {"q": q, **keys, "window_size": window})
