"""The stand-in for flash_attn_npu gives what the real kernel gives, right or wrong."""

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Any

import flash_attn_npu_3
import flash_attn_npu_3_950
import pytest
import torch
from cann_emulator import standin
from cann_emulator.standin.kernel_model import host
from cann_emulator.standin.kernel_model.host03 import METADATA_0_3
from cann_emulator.standin.kernel_model.tiling import BYTES
from flash_attn_npu_3 import flash_attn_npu_3 as raw
from processes import python
from safetensors import safe_open
from torch import Tensor

from fa3_ops import reference

TESTS = Path(__file__).parents[1]
DEFAULTS = dict.fromkeys(host.FORWARD.split()) | {
    "causal": False,
    "window_left": -1,
    "window_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "rotary_interleaved": True,
    "num_splits": 1,
    "sm_margin": 0,
}


def fwd(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw call by name; out starts as NaN."""
    a = DEFAULTS | {"softmax_scale": q.shape[-1] ** -0.5, "out": torch.full_like(q, math.nan)}
    out, lse, _, _ = raw.fwd(*(a | dict(q=q, k=k, v=v) | arguments).values())
    return out, lse


def metadata(lens: Tensor, **arguments: Any) -> Tensor:
    """Of a paged cache: 2 pages of 1024 tokens, 2 heads on 1 kv head, headdim 16."""
    a = dict.fromkeys(host.METADATA.split()) | dict(
        batch_size=len(lens), max_seqlen_q=1, max_seqlen_k=2048, num_heads_q=2, num_heads_kv=1,
        headdim=16, headdim_v=16, qkv_dtype=torch.float16, cache_seqlens=lens, page_size=1024,
        max_seqlen_k_new=0, causal=True, window_left=-1, window_right=-1, attention_chunk=0,
        softcap=0.0, num_splits=1, sm_margin=0,
    )  # fmt: skip
    return raw.get_scheduler_metadata(*(a | arguments).values())


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.half)


def cache(*shape: int) -> tuple[Tensor, Tensor]:
    return randn(*shape), randn(*shape).flip(0)


def paged(lens: Tensor, q_lens: Tensor, heads: int = 2, pages: int = 2) -> dict[str, Any]:
    """Varlen q over pages of 1024, the path on which flash-decode may cut."""
    k, v = cache(len(lens) * pages, 1024, 1, 16)
    return dict(
        q=randn(int(q_lens.sum()), heads, 16), k=k, v=v, seqused_k=lens,
        page_table=torch.arange(len(lens) * pages, dtype=torch.int32).flip(0).view(len(lens), -1),
        cu_seqlens_q=torch.cat([ints(0), q_lens.cumsum(0).int()]),
        max_seqlen_q=int(q_lens.max()), causal=True,
    )  # fmt: skip


def meant(**arguments: Any) -> tuple[Tensor, Tensor]:
    """What FlashAttention-3 means by the same arguments."""
    ignored = ("max_seqlen_q", "num_splits", "out", "scheduler_metadata")
    return reference.batched(**{n: x for n, x in arguments.items() if n not in ignored})


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).detach().abs().max())


# ---- the recorded calls ----


def _golden() -> list[Any]:
    with safe_open(TESTS / "golden" / "npu_v3.safetensors", "pt") as file:
        return [
            pytest.param(case, id=case["name"]) for case in json.loads(file.metadata()["cases"])
        ]


RENAMED = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"}


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("case", _golden())
def test_golden(case: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, scalars = case["name"], dict(case["scalars"])
    with safe_open(TESTS / "golden" / "npu_v3.safetensors", "pt") as file:
        inputs = {key: file.get_tensor(f"{name}/in/{key}").to(device) for key in case["inputs"]}
        out, lse = (file.get_tensor(f"{name}/out/{key}") for key in ("out", "softmax_lse"))
    monkeypatch.setenv("FLASH_ATTN_NPU_STANDIN_CORES", str(case["info"]["cores"]))
    if name == "page_table_strided_rows":
        inputs["page_table"] = inputs["page_table"][:, :5]
    if name == "strided_cache_contents":
        inputs |= {key: inputs[key][:, :64] for key in ("k_cache", "v_cache")}
    left, right = scalars.pop("window_size", (-1, -1))
    scalars = {key: x for key, x in scalars.items() if key in DEFAULTS}
    inputs = {RENAMED.get(key, key): x for key, x in inputs.items()}
    got_out, got_lse = fwd(**inputs, **scalars, window_left=left, window_right=right)
    tolerance = 8e-3 if out.dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(got_out.cpu(), out, atol=tolerance, rtol=0, equal_nan=True)
    got_lse = got_lse.cpu()
    if name == "zero_kv_lse_clobber":  # a race: here it is lost wherever it can be
        assert (got_lse.isinf() >= lse.isinf()).all()
        assert lse[1, 0].isinf()
        assert lse[5, 0].isinf()
        lse[got_lse.isinf()] = math.inf
    torch.testing.assert_close(got_lse, lse, atol=2e-3, rtol=1e-6)


# ---- the silent errors, by their numbers ----


def test_1_cache_batch_idx_is_read_by_nobody() -> None:
    k, v = cache(2, 64, 1, 16)
    q = randn(2, 1, 2, 16)
    out, _ = fwd(q, k, v, kv_batch_idx=ints(1, 0))
    assert error(out, meant(q=q, k=k, v=v)[0]) < 2e-3
    assert error(out, meant(q=q, k=k, v=v, cache_batch_idx=ints(1, 0))[0]) > 0.1


def test_2_qv_changes_the_scale_alone() -> None:
    k, v = cache(1, 64, 1, 16)
    q, qv = randn(1, 1, 2, 16), randn(1, 1, 2, 16).flip(2)
    out = flash_attn_npu_3.flash_attn_func(q.npu(), k.npu(), v.npu(), qv=qv.npu()).cpu()
    assert error(out, meant(q=q, k=k, v=v, softmax_scale=32**-0.5)[0]) < 2e-3
    assert error(out, meant(q=q, k=k, v=v, qv=qv)[0]) > 0.1


def test_3_seqused_q_is_ignored() -> None:
    k, v = cache(1, 64, 1, 16)
    q = randn(1, 4, 2, 16)
    out, _ = fwd(q, k, v, causal=True, seqused_q=ints(2))
    assert error(out, meant(q=q, k=k, v=v, causal=True)[0]) < 2e-3
    assert error(out, meant(q=q, k=k, v=v, causal=True, seqused_q=ints(2))[0]) > 0.1


def test_3_v_without_k_appends_nothing() -> None:
    k, v = cache(1, 64, 1, 16)
    before = v.clone()
    fwd(randn(1, 1, 2, 16), k, v, v_new=randn(1, 1, 1, 16), seqused_k=ints(40))
    assert torch.equal(v, before)


def test_3_cu_seqlens_k_new_is_ignored() -> None:
    k, v = cache(2, 64, 1, 16)
    new, lens = randn(2, 2, 1, 16), ints(40, 30)
    fwd(randn(2, 1, 2, 16), k, v, k_new=new, v_new=new, seqused_k=lens,
        cu_seqlens_k_new=ints(0, 1, 2))  # fmt: skip
    assert torch.equal(k[1, 30:32], new[1])


def test_4_seqused_k_with_cu_seqlens_k_is_ignored() -> None:
    k, v = cache(90, 1, 16)
    a = dict(q=randn(5, 2, 16), k=k, v=v, cu_seqlens_q=ints(0, 2, 5), cu_seqlens_k=ints(0, 40, 90))
    out, _ = fwd(**a, seqused_k=ints(20, 30), max_seqlen_q=3, causal=True)
    assert error(out, meant(**a, causal=True)[0]) < 2e-3
    assert error(out, meant(**a, seqused_k=ints(20, 30), causal=True)[0]) > 0.1


def test_5_unpaged_batch_stride_is_the_first_length() -> None:
    k, v = cache(3, 64, 1, 16)
    q, lens = randn(3, 1, 2, 16), ints(40, 30, 50)
    out, _ = fwd(q, k, v, seqused_k=lens)
    right, _ = meant(q=q, k=k, v=v, seqused_k=lens)
    assert error(out[0], right[0]) < 2e-3
    for b, length in ((1, 30), (2, 50)):
        assert error(out[b], right[b]) > 0.1
        shifted = [x.flatten(0, 1)[40 * b : 40 * b + length][None] for x in (k, v)]
        assert error(out[b], meant(q=q[b : b + 1], k=shifted[0], v=shifted[1])[0][0]) < 2e-3


def test_6_varlen_q_takes_an_unpaged_cache_as_packed() -> None:
    k, v = cache(2, 64, 1, 16)
    a = dict(q=randn(5, 2, 16), cu_seqlens_q=ints(0, 2, 5), causal=True)
    lens = ints(40, 50)
    out, _ = fwd(k=k, v=v, seqused_k=lens, max_seqlen_q=3, **a)
    packed = dict(k=k.flatten(0, 1), v=v.flatten(0, 1), cu_seqlens_k=ints(0, 40, 90))
    assert error(out, meant(**a, **packed)[0]) < 2e-3
    assert error(out, meant(**a, k=k, v=v, seqused_k=lens)[0]) > 0.1


def test_7_strides_are_ignored() -> None:
    both = randn(2, 64, 2, 1, 16)  # keys and values beside each other
    k, v = both.unbind(2)
    q = randn(2, 1, 2, 16)
    out, _ = fwd(q, k, v)
    assert error(out, meant(q=q, k=k, v=v)[0]) > 0.1
    out, _ = fwd(q, k.contiguous(), v.contiguous())
    assert error(out, meant(q=q, k=k, v=v)[0]) < 2e-3


def test_7_the_stride_of_a_page_table_is_ignored() -> None:
    a = paged(ints(1500, 1500), ints(1, 1))
    wide = torch.zeros(2, 5, dtype=torch.int32)
    wide[:, :2] = a["page_table"]
    assert error(fwd(**a | {"page_table": wide[:, :2]})[0], meant(**a)[0]) > 0.05


def test_8_backward_drops_storage_offsets() -> None:
    q, k, v = (randn(2, 32, 2, 64).roll(i) for i in range(3))
    grads = []
    for x in (q[1:], q[1:].clone()):
        out, lse = fwd(q[1:], k[1:], v[1:], causal=True)
        arguments = [
            torch.ones_like(out), x, k[1:].clone(), v[1:].clone(), out, lse, *[None] * 9, 0.125,
            True, -1, -1, 0.0, True, 0,
        ]  # fmt: skip
        grads.append(raw.bwd(*arguments)[0])
    expected = q[1:].double().requires_grad_()
    out, _ = meant(q=expected, k=k[1:], v=v[1:], causal=True)
    out.sum().backward()
    assert error(grads[1], expected.grad) < 5e-3 < 0.05 < error(grads[0], expected.grad)


def test_9_headdim_v_is_taken_as_headdim() -> None:
    k, v = randn(1, 40, 1, 16), randn(1, 40, 1, 32)
    q = randn(1, 1, 2, 16)
    out, _ = fwd(q, k, v)
    narrow = v.flatten()[: 40 * 16].view(1, 40, 1, 16)
    assert out.shape == q.shape
    assert error(out, meant(q=q, k=k, v=narrow)[0]) < 2e-3


def test_10_stale_metadata_drops_keys() -> None:
    a = paged(ints(1700), ints(1))
    stale = metadata(ints(1100), cu_seqlens_q=a["cu_seqlens_q"], num_splits=0)
    out, _ = fwd(**a, num_splits=0, scheduler_metadata=stale)
    assert error(out, meant(**a | {"seqused_k": ints(1536)})[0]) < 2e-3 < error(out, meant(**a)[0])
    unwritten, _ = fwd(**a, scheduler_metadata=metadata(ints(1100), cu_seqlens_q=ints(0, 1)))
    assert unwritten.isnan().all()
    shrunk, _ = fwd(**a | {"seqused_k": ints(600)}, num_splits=0, scheduler_metadata=stale)
    assert shrunk.isnan().all()  # merged with a partial result that nobody computed


def test_10_metadata_brings_batch_heads_headdim_and_scale() -> None:
    a = paged(ints(700, 900), ints(1, 1))
    right, right_lse = meant(**a)
    kept = metadata(a["seqused_k"], cu_seqlens_q=a["cu_seqlens_q"])
    assert error(fwd(**a, scheduler_metadata=kept, softmax_scale=9.0)[0], right) < 2e-3
    fewer = metadata(a["seqused_k"][:1], cu_seqlens_q=a["cu_seqlens_q"])
    out, lse = fwd(**a, scheduler_metadata=fewer)
    assert error(out[0], right[0]) < 2e-3
    assert out[1].isnan().all()
    assert error(lse[0, 1], right_lse[1, 0]) < 2e-3  # heads are one token apart, not two
    for wrong in (dict(num_heads_q=1), dict(headdim=8), dict(softmax_scale=3.0)):
        other = metadata(a["seqused_k"], cu_seqlens_q=a["cu_seqlens_q"], **wrong)
        assert not error(fwd(**a, scheduler_metadata=other)[0], right) < 0.05


def test_11_masked_rows_have_lse_plus_inf() -> None:
    a = paged(ints(4), ints(10))
    out, lse = fwd(**a)
    assert (out[:6] == 0).all()
    assert (lse[:, :6] == math.inf).all()
    assert (meant(**a)[1][:, :6] == -math.inf).all()


def test_12_flash_decode_leaves_garbage_in_masked_rows() -> None:
    a = paged(ints(1500, 1), ints(3, 3))
    out, lse = fwd(**a, num_splits=0)
    right, _ = meant(**a)
    assert error(out[:3], right[:3]) < 2e-3
    assert (out[3:5] != 0).any()
    assert (right[3:5] == 0).all()
    assert (lse[:, 3:5] == -3e38).all()


def test_13_flash_decode_with_splits_does_not_write_for_zero_keys() -> None:
    a = paged(ints(1500, 0), ints(1, 1))
    out, lse = fwd(**a, num_splits=1)
    assert out[1].isnan().all()
    assert (lse[:, 1] == math.inf).all()
    assert (fwd(**a, num_splits=0)[0][1] == 0).all()


@pytest.mark.parametrize("group", [4, 7, 8])
def test_14_zero_keys_overwrite_the_lse_of_others(group: int) -> None:
    a = paged(ints(20, 0, 30), ints(1, 1, 1), heads=group)
    out, lse = fwd(**a)
    right, right_lse = meant(**a)
    assert error(out, right) < 2e-3
    clobbered = lse.isinf() & right_lse.isfinite()
    assert clobbered.any()
    assert not clobbered.all()
    assert error(lse[lse.isfinite()], right_lse[lse.isfinite()]) < 2e-3


def test_rows_of_q_past_the_last_sequence_shift_the_lse() -> None:
    """Not among the fourteen: the step between heads is cu_seqlens_q[-1], not the rows of q."""
    a = paged(ints(20, 30), ints(1, 1))
    right, right_lse = meant(**a)
    a["q"] = torch.cat([a["q"], a["q"]])
    out, lse = fwd(**a)
    assert error(out[:2], right) < 2e-3
    assert error(lse.flatten()[:4], right_lse.flatten()) < 2e-3 < error(lse[:, :2], right_lse)


def test_metadata_loses_a_window_over_a_packed_cache() -> None:
    """Nor this: with metadata the kv bound of a 3-D cache is k.shape[1], its number of heads."""
    k, v = cache(90, 1, 16)
    a = dict(q=randn(2, 2, 16), k=k, v=v, cu_seqlens_q=ints(0, 1, 2))
    lens, window = ints(40, 50), dict(window_left=10, window_right=0)
    bounds = dict(page_size=None, max_seqlen_k=50, causal=False)
    made = metadata(lens, cu_seqlens_q=a["cu_seqlens_q"], **bounds, **window)
    call = a | dict(seqused_k=lens, max_seqlen_q=1) | window
    packed = a | dict(cu_seqlens_k=ints(0, 40, 90))
    right = meant(**packed, window_size=(10, 0))[0]
    assert error(fwd(**call)[0], right) < 2e-3
    lost, _ = fwd(**call, scheduler_metadata=made)
    assert error(lost, meant(**packed)[0]) < 2e-3 < 0.1 < error(lost, right)


# ---- what is right ----


@pytest.mark.parametrize("lens", [(40, 30), (700, 900)])
@pytest.mark.parametrize("layout", ["dense", "dense varlen", "paged", "paged varlen"])
def test_append(layout: str, lens: tuple[int, int]) -> None:
    lens, rows = ints(*lens), 2
    if "paged" in layout:
        a = paged(lens, ints(rows, rows))
    else:
        k, v = cache(2, 1024, 1, 16)
        a = dict(q=randn(4, 2, 16), k=k, v=v, cu_seqlens_q=ints(0, 2, 4), causal=True)
        a |= dict(max_seqlen_q=rows, seqused_k=lens)
    if "varlen" not in layout:
        a["q"] = a["q"].view(2, rows, 2, 16)
        del a["cu_seqlens_q"], a["max_seqlen_q"]
    k_new, v_new = randn(2, 3, 1, 16), randn(2, 3, 1, 16).flip(1)
    k, v = a.pop("k"), a.pop("v")
    del a["seqused_k"]
    right = reference.flash_attn_with_kvcache(
        **{n: x for n, x in a.items() if n != "max_seqlen_q"},
        k_cache=(k_after := k.clone()), v_cache=(v_after := v.clone()), k=k_new, v=v_new,
        cache_seqlens=lens,
    )  # fmt: skip
    got = fwd(**a, k=k, v=v, k_new=k_new, v_new=v_new, seqused_k=lens)
    assert torch.equal(k, k_after)
    assert torch.equal(v, v_after)
    assert error(got[0], right[0]) < 2e-3
    assert error(got[1], right[1]) < 2e-3


@pytest.mark.parametrize("kind", ["causal", "window", "softcap"])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("headdim", [48, 64])
def test_backward(headdim: int, varlen: bool, kind: str) -> None:
    flags: dict[str, Any] = {
        "causal": dict(causal=True),
        "window": dict(window_size=(20, 3)),
        "softcap": dict(softcap=3.0),
    }[kind]
    shape = (70, 4, headdim) if varlen else (2, 35, 4, headdim)
    q, k, v = (randn(*shape).roll(i) for i in range(3))
    k, v = k[..., :2, :].contiguous(), v[..., 2:, :].contiguous()
    cu_q, cu_k = ints(0, 40, 70), ints(0, 10, 70)
    ours = [x.npu().requires_grad_() for x in (q, k, v)]
    theirs = [x.double().requires_grad_() for x in (q, k, v)]
    if varlen:  # the first sequence has rows without a key
        out = flash_attn_npu_3.flash_attn_varlen_func(
            *ours, cu_q.npu(), cu_k.npu(), 40, 60, **flags
        )
        right, _ = reference.batched(*theirs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **flags)
    else:
        out = flash_attn_npu_3.flash_attn_func(*ours, **flags)
        right, _ = reference.batched(*theirs, **flags)
    weight = randn(*q.shape).flip(0)
    out.backward(weight.npu())
    right.backward(weight.double())
    assert error(out.cpu(), right) < 2e-3
    for x, y in zip(ours, theirs, strict=True):
        assert error(x.grad.cpu(), y.grad) < 4e-3


def test_backward_repeats_if_deterministic() -> None:
    q, k, v = (randn(1, 300, 2, 64).roll(i) for i in range(3))
    out, lse = fwd(q, k, v, causal=True)

    def grads(deterministic: bool) -> list[Tensor]:
        flags = 0.125, True, -1, -1, 0.0, deterministic, 0
        return raw.bwd(torch.ones_like(out), q, k, v, out, lse, *[None] * 9, *flags)[:3]

    assert all(map(torch.equal, grads(True), grads(True)))
    assert not all(map(torch.equal, grads(False), grads(False)))


# ---- bits ----


def _row(a: dict[str, Any], b: int, **changes: Any) -> dict[str, Any]:
    """Sequence b of a decode batch, alone."""
    return a | dict(
        q=a["q"][b : b + 1], seqused_k=a["seqused_k"][b : b + 1], cu_seqlens_q=ints(0, 1),
        page_table=a["page_table"][b : b + 1].contiguous(), **changes,
    )  # fmt: skip


def test_one_split_is_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    a = paged(ints(1900, 600), ints(1, 1))
    batch, batch_lse = fwd(**a)
    for cores in (24, 4, 1):
        monkeypatch.setenv("FLASH_ATTN_NPU_STANDIN_CORES", str(cores))
        for b in range(2):
            out, lse = fwd(**_row(a, b))
            assert torch.equal(out[0], batch[b])
            assert torch.equal(lse[:, 0], batch_lse[:, b])


def test_one_split_does_not_see_chunks_or_layout() -> None:
    a = paged(ints(1500), ints(200))
    whole, whole_lse = fwd(**a)
    k, v = (a[n][a["page_table"][0].long()].flatten(0, 1)[None, :1500] for n in ("k", "v"))
    dense, _ = fwd(a["q"][None], k, v, causal=True)
    assert torch.equal(dense[0], whole)
    part = a | dict(q=a["q"][:150], seqused_k=ints(1450), cu_seqlens_q=ints(0, 150))
    out, lse = fwd(**part)
    assert torch.equal(out, whole[:150])
    assert torch.equal(lse, whole_lse[:, :150])
    decode, _ = fwd(**a | dict(q=a["q"][-1:], cu_seqlens_q=ints(0, 1), max_seqlen_q=1))
    assert torch.equal(decode[0], whole[-1])


def test_automatic_splits_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    a = paged(ints(1900, 1900), ints(1, 1))
    more_cores, _ = fwd(**a, num_splits=0)
    monkeypatch.setenv("FLASH_ATTN_NPU_STANDIN_CORES", "3")
    batch, _ = fwd(**a, num_splits=0)
    alone, _ = fwd(**_row(a, 0), num_splits=0)
    assert not torch.equal(batch[0], alone[0])
    assert not torch.equal(batch, more_cores)
    right = meant(**a)[0]
    assert max(error(batch, right), error(more_cores, right), error(alone[0], right[0])) < 2e-3


# ---- what is refused ----

REFUSED: dict[str, dict[str, Any]] = {
    "FP16 and BF16": dict(q=torch.zeros(2, 1, 2, 16)),
    "same dtype": dict(k=torch.zeros(2, 64, 1, 16, dtype=torch.bfloat16)),
    "contiguous last dimension": dict(v=randn(2, 64, 1, 32)[..., ::2]),
    "seqused_k must have dtype int32": dict(seqused_k=torch.tensor([1, 1])),
    "needs max_seqlen_q": dict(q=randn(2, 2, 16), cu_seqlens_q=ints(0, 1, 2)),
    "excludes a page table": dict(cu_seqlens_k=ints(0, 1, 2), page_table=ints(0, 1)[:, None]),
    "head dimension": dict(q=randn(2, 1, 2, 257)),
    "heads of key/value": dict(q=randn(2, 1, 3, 16), k=randn(2, 64, 2, 16)),
    "num_splits must be": dict(num_splits=25),
    "num_splits>1 needs": dict(num_splits=2),
    "attention_chunk": dict(attention_chunk=16),
    "pack_gqa": dict(pack_gqa=True),
    "softcap must be": dict(softcap=-1.0),
    "leftpad_k": dict(leftpad_k=ints(0, 0)),
    "rotary_cos": dict(rotary_cos=randn(64, 8)),
    "q_descale": dict(q_descale=torch.ones(2, 1)),
    "provided together": dict(k_new=randn(2, 1, 1, 16), seqused_k=ints(1, 1)),
    "must be .b, s_new, h_k, d.": dict(
        k_new=randn(2, 1, 16), v_new=randn(2, 1, 16), seqused_k=ints(1, 1)
    ),
    "requires seqused_k": dict(k_new=randn(2, 1, 1, 16), v_new=randn(2, 1, 1, 16)),
    "exceeds cache capacity 64": dict(
        k_new=randn(2, 1, 1, 16), v_new=randn(2, 1, 1, 16), seqused_k=ints(1, 64)
    ),
    "sliding-window": dict(
        k_new=randn(2, 1, 1, 16), v_new=randn(2, 1, 1, 16), seqused_k=ints(9, 9), window_left=3,
        window_right=0,
    ),
    "multiple of 16": dict(
        q=randn(2, 1, 2, 8), k_new=randn(2, 1, 1, 8), v_new=randn(2, 1, 1, 8),
        seqused_k=ints(1, 1), k=randn(2, 64, 1, 8), v=randn(2, 64, 1, 8),
    ),
    "wrong size": dict(scheduler_metadata=torch.zeros(BYTES + 1, dtype=torch.uint8)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    k, v = cache(2, 64, 1, 16)
    with pytest.raises(RuntimeError, match=message):
        fwd(**dict(q=randn(2, 1, 2, 16), k=k, v=v) | REFUSED[message])


def test_a_call_with_an_argument_too_few_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="33 instead of 34"):
        raw.fwd(*[None] * 33)


def test_backward_refuses_seqused() -> None:
    q, k, v = (randn(1, 8, 2, 64) for _ in range(3))
    arguments = [q, q, k, v, q, torch.zeros(1, 2, 8), *[None] * 5, ints(8), *[None] * 3]
    with pytest.raises(RuntimeError, match="seqused_q"):
        raw.bwd(*arguments, 0.125, True, -1, -1, 0.0, True, 0)


def test_reads_outside_an_allocation_are_found() -> None:
    a = paged(ints(1500), ints(1))
    with pytest.raises(AssertionError, match="read outside"):
        fwd(**a | {"page_table": ints(9, 9)[None]})


# ---- the Python functions ----


def _decode(num_splits: int) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    a = paged(ints(1500, 600), ints(1, 1))
    names = dict(k="k_cache", v="v_cache", seqused_k="cache_seqlens")
    call = {names.get(n, n): x.npu() if isinstance(x, Tensor) else x for n, x in a.items()}
    call["num_splits"] = num_splits
    schedule = dict(
        batch_size=2, max_seqlen_q=1, max_seqlen_k=2048, num_heads_q=2, num_heads_kv=1, headdim=16,
        cache_seqlens=call["cache_seqlens"], cu_seqlens_q=call["cu_seqlens_q"], page_size=1024,
        causal=True, num_splits=num_splits,
    )  # fmt: skip
    return call, schedule, meant(**a)[0]


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_kvcache_with_and_without_metadata(num_splits: int) -> None:
    call, schedule, right = _decode(num_splits)
    made = flash_attn_npu_3.get_scheduler_metadata(**schedule)
    assert made.shape == (2384,)
    assert made.dtype == torch.uint8
    with_it = flash_attn_npu_3.flash_attn_with_kvcache(**call, scheduler_metadata=made)
    without = flash_attn_npu_3.flash_attn_with_kvcache(**call)
    assert torch.equal(with_it.cpu(), without.cpu())
    assert error(without.cpu(), right) < 2e-3


def test_kvcache_checks_how_its_metadata_was_made() -> None:
    call, schedule, _ = _decode(1)
    made = flash_attn_npu_3.get_scheduler_metadata(**schedule)
    with pytest.raises(RuntimeError, match="fingerprint"):
        flash_attn_npu_3.flash_attn_with_kvcache(**call, scheduler_metadata=made.clone())
    other = flash_attn_npu_3.get_scheduler_metadata(**schedule | {"causal": False})
    with pytest.raises(ValueError, match="causal: metadata=False vs call=True"):
        flash_attn_npu_3.flash_attn_with_kvcache(**call, scheduler_metadata=other)


def test_tracing_refuses_automatic_splits() -> None:
    call, _, _ = _decode(0)
    refused = pytest.raises(ValueError, match="num_splits <= 0")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), refused:
        flash_attn_npu_3.flash_attn_with_kvcache(**call)


def test_the_append_is_not_declared() -> None:
    schema = torch.ops.flash_attn_npu_3._flash_attn_forward.default._schema
    assert not schema.is_mutable


def test_version() -> None:
    assert importlib.metadata.version("flash_attn_npu") == flash_attn_npu_3.__version__


# ---- graphs ----


def _npu_arguments() -> tuple[dict[str, Any], dict[str, Any]]:
    a = paged(ints(1500, 600), ints(1, 1))
    return a, {n: x.npu() if isinstance(x, Tensor) else x for n, x in a.items()}


def test_replay_reads_new_lengths_and_metadata() -> None:
    a, n = _npu_arguments()
    fwd(**n)  # makes the mask
    cu_q = n["cu_seqlens_q"]
    stable = metadata(n["seqused_k"], cu_seqlens_q=cu_q)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, lse = fwd(**n, scheduler_metadata=stable)
    for lens in (ints(1500, 600), ints(2, 2000)):
        n["seqused_k"].copy_(lens)
        stable.copy_(metadata(n["seqused_k"], cu_seqlens_q=cu_q))
        graph.replay()
        right, right_lse = meant(**a | {"seqused_k": lens})
        assert error(out.cpu(), right) < 2e-3
        assert error(lse.cpu(), right_lse) < 2e-3


@pytest.mark.parametrize("what", ["no metadata", "metadata", "first mask", "append", "unpaged"])
def test_cannot_be_captured(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, n = _npu_arguments()
    fwd(**n)
    stable = metadata(n["seqused_k"], cu_seqlens_q=n["cu_seqlens_q"])
    if what == "first mask":
        monkeypatch.setattr(host, "_triu_mask_made", False)
    if what == "append":
        n["k_new"] = n["v_new"] = randn(2, 1, 1, 16).npu()
    if what == "unpaged":
        del n["page_table"]

    def capture() -> None:
        with torch.npu.graph(torch.npu.NPUGraph()):
            if what == "metadata":
                metadata(n["seqused_k"], cu_seqlens_q=n["cu_seqlens_q"])
            else:
                fwd(**n, scheduler_metadata=None if what == "no metadata" else stable)

    with pytest.raises(RuntimeError, match=r"107027|cannot be made in a capture"):
        capture()


# ---- other releases and devices ----


@pytest.fixture
def old_release(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in [n for n in sys.modules if n.partition(".")[0] == "flash_attn_npu_3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    standin.use("0.2")
    yield importlib.import_module("flash_attn_npu_v3")
    for name in ("flash_attn_npu_v3", "flash_attn_npu_3"):
        del sys.modules[name]


def test_old_release(old_release: Any) -> None:
    assert old_release.__version__ == "0.2.0b1"
    assert importlib.metadata.version("flash_attn_npu") == "0.2.0b1"
    a = paged(ints(700, 900), ints(2, 3))
    right, right_lse = meant(**a)
    names = dict(k="k_cache", v="v_cache", seqused_k="cache_seqlens")
    call = {names.get(n, n): x.npu() if isinstance(x, Tensor) else x for n, x in a.items()}
    longer = call | {"cu_seqlens_q": ints(0, 7, 9, 12).npu()[1:]}
    for arguments in (call, longer):  # packed rows are counted from the first entry
        out, lse, *_ = old_release.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        assert lse.shape == (5, 2)  # token-major
        assert error(out.cpu(), right) < 2e-3
        assert error(lse.cpu().T, right_lse) < 2e-3
    with pytest.raises(RuntimeError, match="softcap"):
        old_release.flash_attn_with_kvcache(**call, softcap=1.0)


@pytest.fixture(scope="module")
def raw_0_3() -> Any:
    return standin.extension("0.3 for 910")


def fwd_0_3(raw_0_3: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    a = DEFAULTS | {"softmax_scale": q.shape[-1] ** -0.5, "out": torch.full_like(q, math.nan)}
    return tuple(raw_0_3.fwd(*(a | dict(q=q, k=k, v=v) | arguments).values())[:2])


def test_0_3_is_found_under_its_name() -> None:
    code = """
from cann_emulator import standin
standin.use("0.3")
from fa3_ops.backends.npu import device
kernel = device.kernel()
print(kernel.version, kernel.module.__file__, hasattr(kernel.module, "bwd"))
"""
    done = python("-c", code)
    assert done.stdout.startswith("(0, 3)"), done.stderr
    assert done.stdout.endswith("0.3/flash_attn_npu_3/flash_attn_npu_3.py True\n")


def test_0_3_counts_rows_from_0_and_gives_heads_first(raw_0_3: Any) -> None:
    a = paged(ints(700, 900), ints(2, 3))
    right, right_lse = meant(**a)
    longer = a | dict(q=torch.cat([randn(7, 2, 16), a["q"]]), cu_seqlens_q=ints(7, 9, 12))
    out, lse = fwd_0_3(raw_0_3, **longer)
    assert error(out[7:], right) < 2e-3
    assert error(lse.flatten()[7:12], right_lse[0]) < 2e-3


def test_0_3_loses_the_causal_mask_of_more_rows_than_keys(raw_0_3: Any) -> None:
    a = paged(ints(4), ints(10))
    out, _ = fwd_0_3(raw_0_3, **a)
    assert error(out, meant(**a | {"causal": False})[0]) < 2e-3
    assert error(out, meant(**a)[0]) > 0.1


@pytest.mark.parametrize("num_splits", [0, 1])
def test_0_3_flash_decode_sees_tiles_before_the_window(raw_0_3: Any, num_splits: int) -> None:
    a = paged(ints(1500), ints(1)) | {"causal": False}
    window = dict(window_left=200, window_right=0)
    out, _ = fwd_0_3(raw_0_3, **a, **window, num_splits=num_splits)
    right = meant(**a, window_size=(200, 0))[0]
    assert not error(out, right) < 0.02
    dense = a | dict(q=a["q"][None], cu_seqlens_q=None, max_seqlen_q=None)  # no flash-decode
    assert error(fwd_0_3(raw_0_3, **dense, **window)[0][0], right) < 2e-3


def test_0_3_leaves_out_of_a_sequence_without_keys(raw_0_3: Any) -> None:
    out, lse = fwd_0_3(raw_0_3, **paged(ints(20, 0), ints(1, 1)))
    assert out[1].isnan().all()
    assert (lse[:, 1] == math.inf).all()


def test_0_3_appends_nothing(raw_0_3: Any) -> None:
    k, v = cache(2, 64, 1, 16)
    before, new = k.clone(), randn(2, 1, 1, 16)
    fwd_0_3(raw_0_3, randn(2, 1, 2, 16), k, v, k_new=new, v_new=new, seqused_k=ints(9, 9))
    assert torch.equal(k, before)


def test_0_3_metadata_has_the_mask_in_front_and_no_window(raw_0_3: Any) -> None:
    a = paged(ints(1500, 600), ints(1, 1))
    arguments = dict.fromkeys(METADATA_0_3.split()) | dict(
        batch_size=2, max_seqlen_q=1, max_seqlen_k=2048, num_heads_q=2, num_heads_kv=1,
        headdim=16, headdim_v=16, qkv_dtype=torch.float16, cache_seqlens=a["seqused_k"],
        cu_seqlens_q=a["cu_seqlens_q"], page_size=1024, max_seqlen_k_new=0, causal=True,
        window_left=-1, window_right=-1, attention_chunk=0, has_softcap=False, num_splits=1,
        sm_margin=0,
    )  # fmt: skip
    made = raw_0_3.get_scheduler_metadata(*arguments.values())
    assert len(arguments) == 24
    assert made.nbytes == 2048 * 2048 + BYTES
    assert error(fwd_0_3(raw_0_3, **a, scheduler_metadata=made)[0], meant(**a)[0]) < 2e-3
    window = dict(window_left=200, window_right=0)
    lost, _ = fwd_0_3(raw_0_3, **a, **window, scheduler_metadata=made)
    assert error(lost, meant(**a)[0]) < 2e-3


def test_the_new_release_takes_cu_seqlens_q_as_absolute() -> None:
    a = paged(ints(700, 900), ints(2, 3))
    right, _ = meant(**a)
    longer = a | dict(q=torch.cat([randn(7, 2, 16), a["q"]]), cu_seqlens_q=ints(7, 9, 12))
    out, _ = fwd(**longer)
    assert out[:7].isnan().all()
    assert error(out[7:], right) < 2e-3
    with pytest.raises(AssertionError, match="read outside"):
        fwd(**a | {"cu_seqlens_q": ints(7, 9, 12)})


def fwd950(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    a = DEFAULTS | dict(return_softmax_lse=True) | dict(q=q, k=k, v=v) | arguments
    return tuple(flash_attn_npu_3_950.fwd(*a.values())[:2])


def test_950_paged_with_another_headdim_v() -> None:
    a = paged(ints(1500, 600), ints(1, 3))
    a["v"] = torch.cat([a["v"], a["v"].flip(0)], -1)
    right, right_lse = meant(**a)
    size = [2, 3, 2, 1, 16, 32, a["seqused_k"], a["cu_seqlens_q"], None, 1024, 4, 2, True, 0.25]
    made = flash_attn_npu_3_950.get_scheduler_metadata(*size, 0.0, 1, 0, -1, -1)
    assert len(made) == 2384 + 3 * 4
    for scheduler_metadata in (None, made):
        out, lse = fwd950(**a, scheduler_metadata=scheduler_metadata)
        assert error(out, right) < 2e-3
        assert error(lse, right_lse) < 2e-3


def test_950_refuses() -> None:
    a = paged(ints(1500, 600), ints(1, 3))
    for message, wrong in (
        ("k_new", dict(k_new=randn(2, 1, 1, 16))),
        ("requires seqused_k", dict(seqused_k=None)),
        ("contiguous", dict(k=a["k"][:, ::2])),
        ("page_block_size", dict(k=a["k"][:, :64].contiguous())),
        ("positive Q and KV", dict(seqused_k=ints(0, 5))),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd950(**a | wrong)
    q = randn(1, 8, 2, 64)
    arguments = [q, q, q, q, q, torch.zeros(1, 2, 8), *[None] * 9, 0.125, False, 3, 0]
    with pytest.raises(RuntimeError, match="sliding windows"):
        flash_attn_npu_3_950.bwd(*arguments, 0.0, False, 0)


def test_950_backward_keeps_offsets() -> None:
    q, k, v = (randn(2, 32, 2, 64).roll(i)[1:] for i in range(3))
    out, lse = fwd950(q.clone(), k.clone(), v.clone(), seqused_k=ints(32), causal=True)
    arguments = [torch.ones_like(out), q, k, v, out, lse, *[None] * 9, 0.125, True, -1, -1, 0.0]
    grad = flash_attn_npu_3_950.bwd(*arguments, True, 0)[0]
    expected = q.double().requires_grad_()
    meant(q=expected, k=k, v=v, causal=True)[0].sum().backward()
    assert error(grad, expected.grad) < 5e-3
