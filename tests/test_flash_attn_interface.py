"""compat/flash_attn_interface: FlashAttention-3's module, return tuples and operators."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand, rotary
from torch._C import parse_schema

import fa3_ops

FOLDER = Path(__file__).parents[1] / "compat" / "flash_attn_interface"


@pytest.fixture(scope="module", autouse=True)
def interface() -> ModuleType:
    """The module, found without being installed; its operators can be defined only once."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("flash_attn_interface")
    finally:
        sys.path.remove(str(FOLDER))


# As hopper/flash_attn_interface.py of flash-attention has them.
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
SIGNATURES = {
    "flash_attn_func": (
        f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALES}, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        f"seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALES}, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
        "deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {DESCALES}, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
        "return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        f"{DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(interface: ModuleType, name: str) -> None:
    """What fa3_ops adds can only be given by name."""
    got = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(getattr(interface, name)).parameters.values()
        if p.kind is not p.KEYWORD_ONLY
    )
    assert got == SIGNATURES[name]


def test_every_function_is_there(interface: ModuleType) -> None:
    assert sorted(interface.__all__) == sorted(SIGNATURES)


# What upstream's test_flash3_bw_compatibility promises.
CUT = "int window_size_left=-1, int window_size_right=-1, "
SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, "
    "Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
    "Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    f"Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, {CUT}"
    "int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    f"float? softmax_scale=None, bool is_causal=False, {CUT}float softcap=0., "
    "bool deterministic=False, int sm_margin=0) -> "
    "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fwd_combine": "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)",
    "get_scheduler_metadata": "(int batch_size, int max_seqlen_q, int max_seqlen_k, "
    "int num_heads, int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, "
    "Tensor seqused_k, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, "
    f"int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, {CUT}"
    "int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_backward_compatible(name: str) -> None:
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    assert schema.is_backward_compatible_with(parse_schema(f"flash_attn_3::{name}{SCHEMAS[name]}"))


def equal(got: Any, want: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_with_kvcache_returns_four(interface: ModuleType) -> None:
    q, cache = rand(2, 1, 4, 16), rand(2, 8, 2, 16)
    call = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": 5}
    want = fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    got = interface.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    assert equal(got[:2], want)
    assert [x.numel() for x in got[2:]] == [0, 0]
    assert torch.equal(interface.flash_attn_with_kvcache(**call), want[0])


class TestFwd:
    def test_dense(self) -> None:
        q, k, v = rand(2, 5, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 8)
        qv = rand(2, 5, 4, 8)
        out = torch.empty(2, 5, 4, 8)
        got = torch.ops.flash_attn_3.fwd(
            *(q, k, v, None, None, qv, out),
            softmax_scale=0.3,
            is_causal=True,
            window_size_left=5,
            window_size_right=2,
            attention_chunk=4,
            softcap=2.0,
        )
        want = fa3_ops.flash_attn_func(
            *(q, k, v, 0.3, True, qv),
            window_size=(5, 2),
            attention_chunk=4,
            softcap=2.0,
            return_attn_probs=True,
        )
        assert got[0].data_ptr() == out.data_ptr()
        assert equal(got[:2], want)
        assert [x.numel() for x in got[2:]] == [0, 0]

    def test_packed(self) -> None:
        q, k = rand(11, 4, 16), rand(17, 2, 16)
        cu_q, cu_k, used_q, used_k = ints(0, 5, 11), ints(0, 8, 17), ints(4, 6), ints(8, 2)
        got = torch.ops.flash_attn_3.fwd(
            q,
            k,
            k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            seqused_q=used_q,
            seqused_k=used_k,
            max_seqlen_q=6,
            max_seqlen_k=9,
        )
        want = fa3_ops.flash_attn_varlen_func(
            q, k, k, cu_q, cu_k, 6, 9, used_q, used_k, return_attn_probs=True
        )
        assert equal(got[:2], want)

    def test_pages(self) -> None:
        q, pages, table, used = rand(2, 3, 4, 16), rand(6, 4, 2, 16), ints(3, 1, 0, 5), ints(6, 3)
        table = table.view(2, 2)
        got = torch.ops.flash_attn_3.fwd(q, pages, pages, seqused_k=used, page_table=table)
        call = {"cache_seqlens": used, "page_table": table, "return_softmax_lse": True}
        assert equal(got[:2], fa3_ops.flash_attn_with_kvcache(q, pages, pages, **call))

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_append(self, interleaved: bool) -> None:
        cos, sin = rotary(20, 8)
        q, new = rand(2, 3, 4, 16), (rand(2, 3, 2, 16), rand(2, 3, 2, 8))
        caches = rand(3, 20, 2, 16), rand(3, 20, 2, 8)
        ours, theirs = ([x.clone() for x in caches] for _ in range(2))
        seqlens, batch_idx, leftpad, turn = ints(4, 9), ints(2, 0), ints(1, 3), ints(0, 5)
        got = torch.ops.flash_attn_3.fwd(
            *(q, *ours, *new),
            seqused_k=seqlens,
            kv_batch_idx=batch_idx,
            leftpad_k=leftpad,
            rotary_cos=cos,
            rotary_sin=sin,
            seqlens_rotary=turn,
            is_causal=True,
            is_rotary_interleaved=interleaved,
        )
        want = fa3_ops.flash_attn_with_kvcache(
            *(q, *theirs, *new),
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=seqlens,
            cache_batch_idx=batch_idx,
            cache_leftpad=leftpad,
            rotary_seqlens=turn,
            causal=True,
            rotary_interleaved=interleaved,
            return_softmax_lse=True,
        )
        assert equal((*got[:2], *ours), (*want, *theirs))
        assert not torch.equal(ours[0], caches[0])


class TestBwd:
    def check(self, function: Any, tensors: list[Any], lengths: dict[str, Any]) -> None:
        tensors = [x.requires_grad_() for x in tensors]
        call = {"softmax_scale": 0.3, "causal": True, "window_size": (3, -1), "softcap": 2.0}
        out, lse = function(*tensors, **lengths, **call, return_attn_probs=True)
        dout = torch.randn_like(out)
        want = torch.autograd.grad(out, tensors, dout)
        dq = torch.empty_like(tensors[0])
        tensors = [x.detach() for x in (dout, *tensors, out, lse)]
        call = {"softmax_scale": 0.3, "is_causal": True, "window_size_left": 3, "softcap": 2.0}
        got = torch.ops.flash_attn_3.bwd(*tensors, dq, **lengths, **call)
        assert equal(got[:3], want)
        assert torch.equal(dq, want[0])
        delta = (dout * out).sum(-1).transpose(-1, -2)
        torch.testing.assert_close(got[3], delta.detach())
        torch.testing.assert_close(torch.exp2(got[4]), torch.exp(lse).detach())
        assert [x.numel() for x in got[5:]] == [0, 0, 0]

    def test_dense(self) -> None:
        tensors = [rand(2, 5, 4, 16), rand(2, 9, 2, 16), rand(2, 9, 2, 8)]
        self.check(fa3_ops.flash_attn_func, tensors, {})

    def test_packed(self) -> None:
        lengths = {"cu_seqlens_q": ints(0, 5, 11), "cu_seqlens_k": ints(0, 8, 17)}
        lengths |= {"max_seqlen_q": 6, "max_seqlen_k": 9, "seqused_k": ints(7, 9)}
        tensors = [rand(11, 4, 16), rand(17, 2, 16), rand(17, 2, 8)]
        self.check(fa3_ops.flash_attn_varlen_func, tensors, lengths)


def test_fwd_combine() -> None:
    parts = rand(3, 2, 5, 4, 16), rand(3, 2, 5, 4)
    got = torch.ops.flash_attn_3.fwd_combine(*parts, None, torch.bfloat16)
    assert equal(got, fa3_ops.flash_attn_combine(*parts, out_dtype=torch.bfloat16))
    out = torch.empty(2, 5, 4, 16)
    torch.ops.flash_attn_3.fwd_combine(*parts, out)
    assert torch.equal(out, fa3_ops.flash_attn_combine(*parts)[0])


def test_get_scheduler_metadata() -> None:
    used = ints(9000, 4)
    got = torch.ops.flash_attn_3.get_scheduler_metadata(
        2, 1, 9000, 4, 2, 16, 8, torch.bfloat16, used, num_splits=3
    )
    want = fa3_ops.get_scheduler_metadata(2, 1, 9000, 4, 2, 16, used, headdim_v=8, num_splits=3)
    assert torch.equal(got, want)
    assert want.tolist() != [1, 1]


def test_seqused_q_beside_an_append() -> None:
    q, used, rows = rand(2, 3, 4, 16), ints(3, 4), ints(2, 0)
    new, cache = rand(2, 3, 2, 16), rand(2, 8, 2, 16)
    first, second = cache.clone(), cache.clone()
    got, lse, *_ = torch.ops.flash_attn_3.fwd(
        *(q, first, first.clone(), new, new), seqused_q=rows, seqused_k=used, is_causal=True
    )
    want = fa3_ops.flash_attn_with_kvcache(
        *(q, second, second.clone(), new, new),
        cache_seqlens=used,
        seqused_q=rows,
        causal=True,
        return_softmax_lse=True,
    )
    assert torch.equal(got, want[0])
    assert torch.equal(lse, want[1])
    assert torch.equal(first, second)


def test_fwd_refuses_packed_keys_beside_an_append() -> None:
    q, cache, used = rand(2, 1, 4, 16), rand(2, 8, 2, 16), ints(3, 4)
    text = re.escape("cu_seqlens_k must be None with k_new, rotary_cos, kv_batch_idx or leftpad_k,")
    with pytest.raises(ValueError, match=text):
        torch.ops.flash_attn_3.fwd(
            *(q, cache, cache), seqused_k=used, leftpad_k=ints(0, 1), cu_seqlens_k=ints(0, 3, 7)
        )


FINDS = """
import importlib.metadata
from importlib.util import find_spec

assert find_spec("flash_attn_3") and find_spec("flash_attn_interface")
assert importlib.metadata.version("flash-attn-3") == "3.0.0"
owners = importlib.metadata.packages_distributions()
assert owners["flash_attn_3"] == owners["flash_attn_interface"] == ["flash_attn_3"]

import flash_attn_3._C
import torch
from flash_attn_3 import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_3.flash_attn_interface import flash_attn_func
from flash_attn_interface import flash_attn_func as same

assert flash_attn_func is same
assert flash_attn_3.__version__ == "3.0.0"
assert torch.ops.flash_attn_3.fwd
"""


def test_what_others_look_for_is_found_once_installed(tmp_path: Path) -> None:
    """transformers asks for the distribution, diffusers and vLLM for the modules."""
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    paths = os.pathsep.join((str(target), str(Path(fa3_ops.__file__).parents[1])))
    subprocess.run(
        [sys.executable, "-c", FINDS], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
