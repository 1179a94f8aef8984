"""What a user's mistake says: the argument, what it must be, what it was; nothing is written."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from expecttest import TestCase
from sample_inputs import appending, cached, dense, fp8, ints, rand, rotary, varlen

import fa3_ops

ops = torch.ops.fa3npu


def paged(**changes: Any) -> dict[str, Any]:
    call = {"k_cache": rand(6, 4, 2, 16), "v_cache": rand(6, 4, 2, 16)}
    return appending(**call, page_table=ints(0, 3, 5, 1).view(2, 2)) | changes


def message(
    function: Any,
    call: dict[str, Any],
    kind: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> str:
    """The message of the error that the call raises, having written nothing."""
    before = {name: x.clone() for name, x in call.items() if name.endswith("_cache")}
    with pytest.raises(kind) as caught:
        function(**call)
    for name, cache in before.items():
        assert torch.equal(call[name].double(), cache.double()), f"{name} was written"
    return str(caught.value)


class TestMessages(TestCase):
    maxDiff = None

    def check(self, cases: dict[str, dict[str, Any]], function: Any, expected: str) -> None:
        kinds = {True: TypeError, False: ValueError}
        lines = [
            f"{name}: {message(function, call, kinds[name.startswith('dtype')])}"
            for name, call in cases.items()
        ]
        self.assertExpectedInline("\n".join(lines), expected, skip=1)

    def test_dense(self) -> None:
        cases = {
            "dtype of q": dense(q=torch.zeros(2, 3, 4, 16, dtype=torch.int64)),
            "dtype of k": dense(k=rand(2, 5, 2, 16).half()),
            "dtype of qv": dense(qv=rand(2, 3, 4, 16).half()),
            "dtype of alibi_slopes": dense(alibi_slopes=torch.zeros(4).half()),
            "dtype of sinks": dense(sinks=torch.zeros(4, dtype=torch.int32)),
            "rank": dense(q=rand(3, 4, 16)),
            "batch": dense(k=rand(3, 5, 2, 16)),
            "headdim": dense(k=rand(2, 5, 2, 8)),
            "v": dense(v=rand(2, 4, 2, 16)),
            "v of another batch": dense(v=rand(3, 5, 2, 16)),
            "v of other heads": dense(v=rand(2, 5, 1, 16)),
            "rank of k": dense(k=rand(5, 2, 16)),
            "rank of v": dense(v=rand(2, 5, 2)),
            "heads": dense(k=rand(2, 5, 3, 16), v=rand(2, 5, 3, 16)),
            "no heads": dense(k=rand(2, 5, 0, 16), v=rand(2, 5, 0, 16)),
            "large headdim": dense(q=rand(2, 3, 4, 513), k=rand(2, 5, 2, 513)),
            "headdim_v of 0": dense(v=rand(2, 5, 2, 0)),
            "qv": dense(qv=rand(2, 3, 4, 8)),
            "device": dense(k=rand(2, 5, 2, 16).to("meta")),
            "NaN scale": dense(softmax_scale=math.nan),
            "softcap": dense(softcap=-1.0),
            "attention_chunk": dense(attention_chunk=-2),
            "window_size": dense(window_size=(1, 2, 3)),
            "num_splits": dense(num_splits=-2),
            "alibi_slopes": dense(alibi_slopes=torch.zeros(3)),
            "alibi_slopes per batch": dense(alibi_slopes=torch.zeros(3, 4)),
            "sinks": dense(sinks=torch.zeros(2)),
            "sinks twice": dense(sinks=torch.zeros(4), s_aux=torch.zeros(4)),
            "descale": {
                **{"q": fp8(2, 3, 4, 16), "k": fp8(2, 5, 2, 16), "v": fp8(2, 5, 2, 16)},
                "q_descale": torch.ones(2, 4),
            },
        }
        self.check(
            cases,
            fa3_ops.flash_attn_func,
            """\
dtype of q: q must have one of the dtypes torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, got torch.int64
dtype of k: k must have dtype torch.float32 like q, or one of torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, got torch.float16
dtype of qv: qv must have dtype torch.float32 like q, got torch.float16
dtype of alibi_slopes: alibi_slopes must have dtype torch.float32, got torch.float16
dtype of sinks: sinks must have a floating-point dtype, got torch.int32
rank: q must have shape (batch_size, seqlen_q, nheads, headdim), got (3, 4, 16) without cu_seqlens_q
batch: k must have shape (2, seqlen_k, nheads_k, 16), got (3, 5, 2, 16)
headdim: k must have shape (2, seqlen_k, nheads_k, 16), got (2, 5, 2, 8)
v: v must have shape (2, 5, 2, headdim_v), got (2, 4, 2, 16)
v of another batch: v must have shape (2, 5, 2, headdim_v), got (3, 5, 2, 16)
v of other heads: v must have shape (2, 5, 2, headdim_v), got (2, 5, 1, 16)
rank of k: k must have shape (2, seqlen_k, nheads_k, 16), got (5, 2, 16)
rank of v: v must have shape (2, 5, 2, headdim_v), got (2, 5, 2)
heads: nheads of q must be a multiple of nheads_k of k, got 4 and 3
no heads: nheads of q must be a multiple of nheads_k of k, got 4 and 0
large headdim: headdim must be in [1, 512], got 513
headdim_v of 0: headdim_v must be in [1, 512], got 0
qv: qv must have shape (2, 3, 4, 16), got (2, 3, 4, 8)
device: k must be on the device of q, cpu, got meta
NaN scale: softmax_scale must be finite, got nan
softcap: softcap must be finite and at least 0, got -1.0
attention_chunk: attention_chunk must be at least 0, got -2
window_size: window_size must be (left, right), got (1, 2, 3)
num_splits: num_splits must be at least 0 (0: chosen for you) or -1 (no split), got -2
alibi_slopes: alibi_slopes must have shape (4,), got (3,)
alibi_slopes per batch: alibi_slopes must have shape (2, 4), got (3, 4)
sinks: sinks must have shape (4,), got (2,)
sinks twice: sinks and s_aux are the same argument: give one of them, got both
descale: q_descale must have shape (2, 2), (2,), (1,) or (), got (2, 4)""",
        )

    def test_narrow(self) -> None:
        k, v = (torch.zeros(2, 5, 2, 16, dtype=torch.int8) for _ in "kv")
        cases = {
            "dtype of v beside a narrow k": dense(k=k),
            "dtype of v": dense(v=v),
            "dtype of another narrow v": dense(k=k.to(torch.float8_e5m2), v=v),
            "dtype of k beside FP8": dense(q=fp8(2, 3, 4, 16), k=k, v=v),
            "dtype of k beside float64": dense(q=rand(2, 3, 4, 16).double(), k=k, v=v),
            "dtype of qv": dense(k=k, v=v, qv=torch.zeros(2, 3, 4, 16, dtype=torch.int8)),
            "dtype of a descale": dense(k=k, v=v, v_descale=torch.ones(2).half()),
            "descale of a batch": dense(k=k, v=v, v_descale=torch.ones(3, 2)),
            "rank of a descale": dense(k=k, v=v, k_descale=torch.ones(2, 2, 1)),
            "device of a descale": dense(k=k, v=v, k_descale=torch.ones(2, device="meta")),
        }
        self.check(
            cases,
            fa3_ops.flash_attn_func,
            """\
dtype of v beside a narrow k: v must have dtype torch.int8 like k, got torch.float32
dtype of v: v must have dtype torch.float32 like q, got torch.int8
dtype of another narrow v: v must have dtype torch.float8_e5m2 like k, got torch.int8
dtype of k beside FP8: k must have dtype torch.float8_e4m3fn like q, got torch.int8
dtype of k beside float64: k must have dtype torch.float64 like q, got torch.int8
dtype of qv: qv must have dtype torch.float32 like q, got torch.int8
dtype of a descale: v_descale must have dtype torch.float32, got torch.float16
descale of a batch: v_descale must have shape (2, 2), (2,), (1,) or (), got (3, 2)
rank of a descale: k_descale must have shape (2, 2), (2,), (1,) or (), got (2, 2, 1)
device of a descale: k_descale must be on the device of q, cpu, got meta""",
        )

    def test_varlen(self) -> None:
        cases = {
            "dtype of cu_seqlens": varlen(cu_seqlens_q=torch.tensor([0, 3, 7])),
            "dtype of seqused_k": varlen(seqused_k=torch.tensor([1, 2])),
            "no max_seqlen_q": varlen(max_seqlen_q=None),
            "no max_seqlen_k": varlen(max_seqlen_k=None),
            "rank": varlen(q=rand(1, 7, 4, 16)),
            "rank of k": varlen(k=rand(9, 2, 16, 1)),
            "headdim": varlen(k=rand(9, 2, 8)),
            "rank of v": varlen(v=rand(9, 2)),
            "v": varlen(v=rand(8, 2, 16)),
            "v of other heads": varlen(v=rand(9, 1, 16)),
            "rank of cu_seqlens_q": varlen(cu_seqlens_q=ints(0, 3, 7)[None]),
            "cu_seqlens_k of another batch": varlen(cu_seqlens_k=ints(0, 9)),
            "falling": varlen(cu_seqlens_q=ints(0, 5, 3)),
            "negative": varlen(cu_seqlens_k=ints(-1, 3, 9)),
            "past the end": varlen(cu_seqlens_q=ints(0, 3, 8)),
            "no offsets": varlen(cu_seqlens_q=ints(), cu_seqlens_k=ints()),
            "seqused_q": varlen(seqused_q=ints(3, 5)),
            "negative seqused_k": varlen(seqused_k=ints(-1, 5)),
            "pages and cu_seqlens_k": varlen(page_table=ints(0, 1).view(2, 1)),
            "out": varlen(out=rand(7, 4, 8)),
            "out with gradients": varlen(q=rand(7, 4, 16, grad=True), out=rand(7, 4, 16)),
        }
        self.check(
            cases,
            fa3_ops.flash_attn_varlen_func,
            """\
dtype of cu_seqlens: cu_seqlens_q must have dtype torch.int32, got torch.int64
dtype of seqused_k: seqused_k must have dtype torch.int32, got torch.int64
no max_seqlen_q: max_seqlen_q must be given with cu_seqlens_q, got None
no max_seqlen_k: max_seqlen_k must be given with cu_seqlens_k, got None
rank: q must have shape (total_q, nheads, headdim), got (1, 7, 4, 16) with cu_seqlens_q
rank of k: k must have shape (total_k, nheads_k, 16), got (9, 2, 16, 1) with cu_seqlens_k
headdim: k must have shape (total_k, nheads_k, 16), got (9, 2, 8)
rank of v: v must have shape (9, 2, headdim_v), got (9, 2)
v: v must have shape (9, 2, headdim_v), got (8, 2, 16)
v of other heads: v must have shape (9, 2, headdim_v), got (9, 1, 16)
rank of cu_seqlens_q: cu_seqlens_q must have shape (batch_size + 1,), got (1, 3)
cu_seqlens_k of another batch: cu_seqlens_k must have shape (3,), got (2,)
falling: cu_seqlens_q must not fall, got 5 followed by 3 at index 1
negative: cu_seqlens_k[0] must not be negative, got -1
past the end: cu_seqlens_q[2] must be at most the 7 rows of its tensor, got 8
no offsets: cu_seqlens_q must have batch_size + 1 entries, got 0
seqused_q: seqused_q[1] must be in [0, 4], got 5
negative seqused_k: seqused_k[0] must be in [0, 4], got -1
pages and cu_seqlens_k: page_table must be None when cu_seqlens_k is given, got a tensor
out: out must have shape (7, 4, 16), got (7, 4, 8)
out with gradients: out must be None where a gradient is needed, got a tensor""",
        )

    def test_kvcache(self) -> None:
        cases = {
            "dtype of cache_seqlens": cached(cache_seqlens=torch.tensor([5, 2])),
            "dtype of page_table": paged(page_table=torch.zeros(2, 2)),
            "dtype of k": appending(k=rand(2, 3, 2, 16).half()),
            "length past the cache": cached(cache_seqlens=ints(5, 9)),
            "negative length": cached(cache_seqlens=ints(-1, 2)),
            "int length": cached(cache_seqlens=9),
            "leftpad": cached(cache_leftpad=ints(0, 3)),
            "cache_start": cached(cache_start=ints(0, -1)),
            "dtype of cache_start": cached(cache_start=torch.zeros(2)),
            "pages of another headdim": paged(k_cache=rand(6, 4, 2, 8)),
            "rank of pages": paged(k_cache=rand(6, 8, 16)),
            "v of other pages": paged(v_cache=rand(5, 4, 2, 16)),
            "batch of the cache": cached(k_cache=rand(3, 8, 2, 16), v_cache=rand(3, 8, 2, 16)),
            "cache_batch_idx": cached(cache_batch_idx=ints(0, 2)),
            "negative cache_batch_idx": cached(cache_batch_idx=ints(0, -1)),
            "a length too few": paged(
                q=rand(3, 4, 16),
                cu_seqlens_q=ints(0, 1, 2, 3),
                max_seqlen_q=1,
                page_table=ints(0, 3, 5, 1, 2, 4).view(3, 2),
                k=None,
                v=None,
            ),
            "strided cache": cached(k_cache=rand(2, 8, 2, 32)[..., ::2]),
            "rotary without k": cached(rotary_cos=rotary(8, 8)[0]),
            "v without k": cached(v=rand(2, 3, 2, 16)),
            "two tables": paged(block_table=ints(0, 3, 5, 1).view(2, 2)),
        }
        self.check(
            cases,
            fa3_ops.flash_attn_with_kvcache,
            """\
dtype of cache_seqlens: cache_seqlens must have dtype torch.int32, got torch.int64
dtype of page_table: page_table must have dtype torch.int32, got torch.float32
dtype of k: k must have dtype torch.float32 like k_cache, got torch.float16
length past the cache: cache_seqlens[1] must be in [0, 8], got 9
negative length: cache_seqlens[0] must be in [0, 8], got -1
int length: cache_seqlens[0] must be in [0, 8], got 9
leftpad: cache_leftpad[1] must be in [0, 2], got 3
cache_start: cache_start[1] must be at least 0, got -1
dtype of cache_start: cache_start must have dtype torch.int32, got torch.float32
pages of another headdim: k_cache must have shape (num_pages, page_size, nheads_k, 16), got (6, 4, 2, 8)
rank of pages: k_cache must have shape (num_pages, page_size, nheads_k, 16), got (6, 8, 16) with page_table
v of other pages: v_cache must have shape (6, 4, 2, headdim_v), got (5, 4, 2, 16)
batch of the cache: k_cache must have shape (2, seqlen_k, nheads_k, 16), got (3, 8, 2, 16)
cache_batch_idx: cache_batch_idx[1] must be in [0, 2), got 2
negative cache_batch_idx: cache_batch_idx[1] must be in [0, 2), got -1
a length too few: cache_seqlens must have shape (3,), got (2,): a dummy sequence that pads cu_seqlens_q must have a length too, 0 for none, or be cut off
strided cache: k_cache must have a contiguous last dimension, got stride 2
rotary without k: rotary_cos must come with new keys k, got k=None
v without k: v must come with new keys k, got k=None
two tables: page_table and block_table are the same argument: give one of them, got both""",
        )

    def test_append(self) -> None:
        cos, sin = rotary(8, 8)
        cases = {
            "k without v": appending(v=None),
            "k without lengths": appending(cache_seqlens=None),
            "k": appending(k=rand(2, 3, 4, 16)),
            "v": appending(v=rand(2, 2, 2, 16)),
            "outgrown": appending(cache_seqlens=ints(6, 2)),
            "negative length": appending(cache_seqlens=ints(2, -1)),
            "leftpad": appending(cache_leftpad=ints(0, 3)),
            "cache_start": appending(cache_start=ints(0, -1)),
            "cache_batch_idx": appending(cache_batch_idx=ints(0, 7)),
            "falling cu_seqlens_q": appending(
                q=rand(6, 4, 16), cu_seqlens_q=ints(0, 5, 3), max_seqlen_q=5
            ),
            "falling cu_seqlens_k_new": appending(
                k=rand(6, 2, 16), v=rand(6, 2, 16), cu_seqlens_k_new=ints(0, 5, 3)
            ),
            "page": paged(page_table=ints(0, 3, 5, 6).view(2, 2)),
            "page of the history": paged(page_table=ints(-1, 3, 5, 1).view(2, 2)),
            "table of another batch": paged(page_table=ints(0, 3).view(1, 2)),
            "outgrown pages": paged(cache_seqlens=ints(5, 6)),
            "one of two": appending(rotary_cos=cos),
            "rotary_dim": appending(rotary_cos=rotary(8, 32)[0], rotary_sin=rotary(8, 32)[1]),
            "dtype of rotary_cos": appending(rotary_cos=cos.half(), rotary_sin=sin.half()),
            "too few positions": appending(
                rotary_cos=cos[:7], rotary_sin=sin[:7], cache_seqlens=ints(5, 2), causal=True
            ),
            "out": appending(out=rand(2, 3, 4, 8)),
            "strided out": appending(out=rand(2, 3, 4, 32)[..., ::2]),
            "dtype of out": appending(out=rand(2, 3, 4, 16).half()),
        }
        self.check(
            cases,
            fa3_ops.flash_attn_with_kvcache,
            """\
k without v: v must be given with k, got None
k without lengths: cache_seqlens must be given with k, got None
k: k must have shape (2, seqlen_new, 2, 16), got (2, 3, 4, 16)
v: v must have shape (2, 3, 2, 16), got (2, 2, 2, 16)
outgrown: cache_seqlens[0] must leave room for 3 new keys in a cache of 8, got 6
negative length: cache_seqlens[1] must not be negative, got -1
leftpad: cache_leftpad[1] must be in [0, 2], got 3
cache_start: cache_start[1] must be at least 0, got -1
cache_batch_idx: cache_batch_idx[1] must be in [0, 2), got 7
falling cu_seqlens_q: cu_seqlens_q must not fall, got 5 followed by 3 at index 1
falling cu_seqlens_k_new: cache_seqlens[0] must leave room for 5 new keys in a cache of 8, got 5
page: page_table[1, 1] must be in [0, 6), got 6
page of the history: page_table[0, 0] must be in [0, 6), got -1
table of another batch: page_table must have shape (2, max_num_pages_per_seq), got (1, 2)
outgrown pages: cache_seqlens[1] must leave room for 3 new keys in a cache of 8, got 6
one of two: rotary_cos and rotary_sin must be given together, got one of them
rotary_dim: rotary_dim must be at most headdim, 16, got 32
dtype of rotary_cos: rotary_cos must have dtype torch.float32 like q, or torch.float32, got torch.float16
too few positions: rotary_cos must reach position 7 of sequence 0, got 7 positions
out: out must have shape (2, 3, 4, 16), got (2, 3, 4, 8)
strided out: out must have a contiguous last dimension, got stride 2
dtype of out: out must have dtype torch.float32, got torch.float16""",
        )

    def test_others(self) -> None:
        partial = {"out_partial": rand(3, 2, 5, 4, 16), "lse_partial": rand(3, 2, 5, 4)}
        cases = {
            "rank": partial | {"out_partial": rand(2, 5, 4)},
            "lse": partial | {"lse_partial": rand(3, 2, 4, 5)},
            "dtype of out_partial": partial | {"out_partial": rand(3, 2, 5, 4, 16).half()},
            "dtype of out_dtype": partial | {"out_dtype": torch.int32},
            "out": partial | {"out": rand(2, 5, 4, 8)},
        }
        self.check(
            cases,
            fa3_ops.flash_attn_combine,
            """\
rank: out_partial must have shape (num_splits, batch_size, seqlen, nheads, headdim), got (2, 5, 4)
lse: lse_partial must have shape (3, 2, 5, 4), got (3, 2, 4, 5)
dtype of out_partial: out_partial must have dtype torch.float32, got torch.float16
dtype of out_dtype: out_dtype must be torch.float32, torch.float16 or torch.bfloat16, got torch.int32
out: out must have shape (2, 5, 4, 16), got (2, 5, 4, 8)""",
        )
        cases = {
            "heads": {"qkv": rand(2, 5, 7, 16), "num_heads_q": 4},
            "no num_heads_q": {"qkv": rand(2, 5, 8, 16)},
            "two": {"qkv": rand(2, 5, 2, 4, 16)},
        }
        self.check(
            cases,
            fa3_ops.flash_attn_qkvpacked_func,
            """\
heads: num_heads_q must leave an even number of heads for k and v, got 4 of 7
no num_heads_q: num_heads_q must be given for a 4-dimensional qkv, got None
two: qkv must have shape (batch_size, seqlen, 3, nheads, headdim), got (2, 5, 2, 4, 16)""",
        )


class TestWhereChecksLive:
    def test_operators_alone_refuse_too(self) -> None:
        """The composite checks like the interface; a leaf has the kernel's checks."""
        with pytest.raises(ValueError, match=re.escape("k_cache must have shape (2, seqlen_k,")):
            ops.flash_attn_with_kvcache(**cached(k_cache=rand(3, 8, 2, 16)))
        with pytest.raises(RuntimeError, match=r"cache_seqlens\[1\] must be in \[0, 8\], got 9"):
            ops.flash_attn_kvcache(**cached(cache_seqlens=ints(5, 9)))
        with pytest.raises(RuntimeError, match=r"page_table\[1, 1\] must be in \[0, 6\), got 6"):
            ops.flash_attn_kvcache(
                rand(2, 3, 4, 16),
                *(rand(6, 4, 2, 16), rand(6, 4, 2, 16)),
                cache_seqlens=ints(5, 5),
                page_table=ints(0, 3, 5, 6).view(2, 2),
            )

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
    def test_what_a_cache_holds_but_nobody_computes_with_is_not_rotated(
        self, dtype: torch.dtype, backend: str
    ) -> None:
        x, cache = torch.zeros(2, 3, 2, 16, dtype=dtype), torch.zeros(2, 8, 2, 16, dtype=dtype)
        cos, sin = rotary(8, 16)
        new = {"k": x, "v": x, "rotary_cos": cos, "rotary_sin": sin}
        with (
            fa3_ops.use_backend(backend),
            pytest.raises(RuntimeError, match=r"k must .*, got (torch|Char|Float8)"),
        ):
            ops.kvcache_append_(
                x, x, cache, cache.clone(), ints(0, 4), rotary_cos=cos, rotary_sin=sin
            )
        with pytest.raises(TypeError, match=rf"^k must have one of .* to be rotated, got {dtype}"):
            fa3_ops.flash_attn_with_kvcache(
                rand(2, 3, 4, 16), cache, cache.clone(), cache_seqlens=ints(0, 4), **new
            )

    @pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32, torch.complex64])
    def test_leaves_refuse_dtypes_without_arithmetic(self, dtype: torch.dtype) -> None:
        """Elements of another size than float64's would be read and written outside the tensor."""
        text = "must be float64, float32, float16, bfloat16 or float8_e4m3fn, got "
        x = torch.zeros(2, 3, 2, 16, dtype=dtype)
        table = torch.ones(9, 8, dtype=dtype)
        with pytest.raises(RuntimeError, match=f"x {text}"):
            ops.apply_rotary(x, table, table, ints(0, 4))
        cache = torch.zeros(2, 8, 2, 16, dtype=dtype)
        text = text.replace(" or float8_e4m3fn", ", float8_e4m3fn, float8_e5m2 or int8")
        with pytest.raises(RuntimeError, match=f"k_cache {text}"):
            ops.kvcache_append_(x, x, cache, cache.clone(), ints(0, 4))
        with pytest.raises(RuntimeError, match=f"k_cache {text}"):
            ops.kvcache_scatter_(x[0], x[0], cache, cache.clone(), ints(0, 4))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"cache_seqlens": ints(6, 2)}, "must leave room for 3 new keys"),
            ({"cache_seqlens": ints(2, -1)}, "must not be negative"),
            ({"cache_batch_idx": ints(0, 7)}, "must be in"),
            ({"page_table": ints(0, 3, 5, 6).view(2, 2)}, "must be in"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_compiled_code_checks_values_in_the_kernel(self, change: Any, text: str) -> None:
        torch._dynamo.reset()
        call = paged(**change) if "page_table" in change else appending(**change)
        before = call["k_cache"].clone(), call["v_cache"].clone()
        step = torch.compile(fa3_ops.flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=text):
            step(**call)
        assert torch.equal(call["k_cache"], before[0])
        assert torch.equal(call["v_cache"], before[1])

    def test_leaf_append_is_all_or_nothing(self) -> None:
        """The second sequence is wrong; the first is not written either."""
        k_cache = rand(2, 8, 2, 16)
        before = k_cache.clone()
        with pytest.raises(RuntimeError, match="must leave room"):
            ops.kvcache_append_(
                rand(2, 3, 2, 16), rand(2, 3, 2, 16), k_cache, k_cache.clone(), ints(0, 7)
            )
        assert torch.equal(k_cache, before)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"out": rand(3, 4, 16, grad=True).expand(2, 3, 4, 16) * 1}, "but out requires grad"),
            ({"k": rand(2, 3, 2, 16, grad=True)}, "but k requires grad"),
            (
                {"out": rand(3, 4, 16).expand(2, 3, 4, 16)},
                "out must have a place for every element",
            ),
            ({"out": rand(200).as_strided((2, 3, 4, 16), (64, 32, 16, 1))}, "a stride of 32"),
            ({"out": None}, "out must be a tensor, got None"),
            (
                {
                    "k_cache": rand(6, 0, 2, 16),
                    "v_cache": rand(6, 0, 2, 16),
                    "page_table": ints(0, 3, 5, 6).view(2, 2),
                },
                "must have a page_size of at least 1",
            ),
            ({"q": rand(2, 3, 4, 16).to_sparse()}, "every tensor must be strided"),
            ({"sinks": rand(4).to_sparse()}, "every tensor must be strided"),
            ({"out": torch._neg_view(rand(2, 3, 4, 16))}, "out is written and must not be"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_what_attention_refuses_is_not_appended(self, change: Any, text: str) -> None:
        """The composite appends first and attends then, so it looks at everything before."""
        call = appending(out=torch.zeros(2, 3, 4, 16)) | change
        kinds = (ValueError, TypeError, RuntimeError)
        assert text in message(ops.flash_attn_with_kvcache.out, call, kinds)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *((n, 2**70) for n in ("max_seqlen_q", "attention_chunk", "num_splits", "sm_margin")),
            ("window_size", (-(2**70), 0)),
        ],
    )
    def test_numbers_that_are_too_large_are_not_appended(self, name: str, value: Any) -> None:
        call = appending() | {name: value}
        text = message(fa3_ops.flash_attn_with_kvcache, call, (ValueError, TypeError))
        assert text.startswith(f"{name} must be")
