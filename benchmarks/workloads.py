"""What is timed: every row of the tables as plain data, and what each row must reach.

Nothing here imports torch: the parent process must stay free of it (see cpu_attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(ITEMSIZE)
VARLEN = (1024, 700, 512, 300, 256, 128, 96, 64, 8)


@dataclass(frozen=True)
class Workload:
    """One row. kind: "decode" (one query row a sequence, keys in a cache), "prefill" (the last
    seqlen_q rows of seqlen_k keys, causal), "varlen" (packed sequences, causal) or "train"
    (forward and backward, causal)."""

    group: str
    kind: str
    dtype: str = "bfloat16"
    batch_size: int = 1
    nheads: int = 32
    nheads_k: int = 8
    headdim: int = 128
    headdim_v: int = 128
    qv: bool = False  # MLA: q and k have headdim more dimensions besides the headdim_v of v
    seqlen_q: int = 1
    seqlen_k: int = 1024
    lengths: tuple[int, ...] = ()  # of kind "varlen"
    page_size: int = 0  # 0: a dense cache
    window: int = 0  # keys that a row sees, itself included; 0: all
    warm: bool = False  # decode from one cache that stays in L2, instead of from DRAM
    int_seqlens: bool = False  # ours gets cache_seqlens as an int
    unit: str = "GB/s"  # "GB/s" of K and V, "GFLOP/s", "us" or "ms"
    quick: bool = False  # part of --quick
    peers: tuple[str, ...] = field(default=(), compare=False)  # only these; (): all but flex

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def key_bytes(self) -> int:
        """Bytes of one key and its value, all KV heads."""
        return self.nheads_k * (self.headdim + self.headdim_v) * self.itemsize

    @property
    def cache_bytes(self) -> int:
        return self.batch_size * self.seqlen_k * self.key_bytes

    @property
    def read_bytes(self) -> int:
        """K and V that a decode step has to read."""
        seen = min(self.window or self.seqlen_k, self.seqlen_k)
        return self.batch_size * seen * self.key_bytes

    @property
    def flops(self) -> float:
        """A causal mask counts half, masked keys count nothing; the backward 2.5 forwards."""
        if self.lengths:
            pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        else:
            first = self.seqlen_k - self.seqlen_q
            ends = range(first + 1, self.seqlen_k + 1)
            pairs = self.batch_size * sum(min(end, self.window or end) for end in ends)
        factor = 3.5 if self.kind == "train" else 1.0
        return factor * 2 * self.nheads * (self.headdim + self.headdim_v) * pairs

    @property
    def softmax_scale(self) -> float:
        dims = self.headdim + (self.headdim_v if self.qv else 0)
        return float(dims**-0.5)

    def value(self, seconds: float) -> float:
        """The time in the row's unit."""
        if self.unit == "GB/s":
            return self.read_bytes / seconds / 1e9
        if self.unit == "GFLOP/s":
            return self.flops / seconds / 1e9
        return seconds * {"us": 1e6, "ms": 1e3}[self.unit]

    def small(self) -> Workload:
        """The same call at a size that a float64 oracle takes in a moment. Rows that differ in
        lengths alone have the same small form, so that a form is checked once."""
        sizes: dict[str, Any] = {
            "decode": {"batch_size": 2, "seqlen_k": 256},
            "prefill": {"seqlen_q": 256, "seqlen_k": 256},
            "varlen": {},
            "train": {"seqlen_q": 96, "seqlen_k": 96},
        }[self.kind]
        if self.kind == "prefill" and self.seqlen_q < self.seqlen_k:
            sizes = {"seqlen_q": 64, "seqlen_k": 256}
        return replace(
            self,
            **sizes,
            group="",
            unit="ms",
            quick=False,
            lengths=(96, 33, 8) if self.lengths else (),
            window=64 if self.window else 0,
        )

    def label(self) -> str:
        """What distinguishes the row in its group."""
        layout = f"pages of {self.page_size}" if self.page_size else "dense"
        where = {
            "decode": f"{self.batch_size} x {self.seqlen_k}, {layout}",
            "prefill": f"{self.seqlen_q}"
            + (f" of {self.seqlen_k}" if self.seqlen_q < self.seqlen_k else ""),
            "varlen": f"{len(self.lengths)} sequences",
            "train": f"{self.seqlen_q}",
        }[self.kind]
        parts = [self.kind, self.dtype, where]
        if self.qv:
            parts.append(f"d {self.headdim} + qv {self.headdim_v}")
        elif self.headdim != self.headdim_v:
            parts.append(f"d {self.headdim}/{self.headdim_v}")
        elif self.headdim != 128 or self.kind == "train":
            parts.append(f"d {self.headdim}")
        if (self.nheads, self.nheads_k) != (32, 8):
            parts.append(f"h {self.nheads}/{self.nheads_k}")
        if self.window:
            parts.append(f"window {self.window}")
        if self.warm:
            parts.append(f"cache_seqlens {'an int' if self.int_seqlens else 'a tensor'}")
        return ", ".join(parts)


EVERYONE = ("ours", "sdpa", "sdpa_newest", "flex", "vllm", "openvino", "onnxruntime", "llama_cpp")


def decode() -> Iterator[Workload]:
    quick = {
        ("bfloat16", 0): ((1, 4096), (8, 4096)),
        ("bfloat16", 16): ((8, 4096),),
        ("bfloat16", 128): ((1, 4096), (8, 4096)),
        ("float16", 0): ((8, 4096),),
        ("float32", 0): ((8, 4096),),
    }
    for dtype in DTYPES:
        for page_size in (0, 16, 128):
            for shape in ((1, 1024), (1, 4096), (1, 16384), (8, 1024), (8, 4096), (32, 1024)):
                # Each shape of FlexAttention is half a dozen seconds of compiling: two of them.
                compiled = page_size == 0 and shape in ((1, 4096), (8, 4096))
                yield Workload(
                    "decode",
                    "decode",
                    dtype,
                    *shape[:1],
                    seqlen_k=shape[1],
                    page_size=page_size,
                    quick=shape in quick.get((dtype, page_size), ()),
                    peers=EVERYONE if compiled else (),
                )


def tiny() -> Iterator[Workload]:
    for int_seqlens in (False, True):
        yield Workload(
            "tiny",
            "decode",
            seqlen_k=128,
            warm=True,
            int_seqlens=int_seqlens,
            unit="us",
            quick=True,
            peers=EVERYONE,
        )


def prefill() -> Iterator[Workload]:
    for dtype in DTYPES:
        for seqlen in (512, 2048, 4096):
            yield Workload(
                "prefill",
                "prefill",
                dtype,
                seqlen_q=seqlen,
                seqlen_k=seqlen,
                unit="GFLOP/s",
                quick=seqlen == 512 or (seqlen == 2048 and dtype == "bfloat16"),
                peers=EVERYONE if seqlen < 4096 else (),
            )


def varlen() -> Iterator[Workload]:
    for dtype in DTYPES:
        yield Workload(
            "varlen", "varlen", dtype, lengths=VARLEN, unit="GFLOP/s", quick=dtype == "bfloat16"
        )


def train() -> Iterator[Workload]:
    for dtype in ("bfloat16", "float32"):
        for headdim in (64, 128):
            for seqlen in (1024, 2048):
                yield Workload(
                    "train",
                    "train",
                    dtype,
                    nheads=16,
                    nheads_k=16,
                    headdim=headdim,
                    headdim_v=headdim,
                    seqlen_q=seqlen,
                    seqlen_k=seqlen,
                    unit="GFLOP/s",
                    quick=(dtype, headdim, seqlen) == ("bfloat16", 128, 1024),
                    peers=("ours", "sdpa", "flex"),
                )


def window() -> Iterator[Workload]:
    """Without a window, with one, and without one over as many keys as it has."""
    for seqlen_q, kind in ((1, "decode"), (1024, "prefill")):
        row = Workload(
            "window", kind, seqlen_q=seqlen_q, seqlen_k=16384, unit="ms", quick=seqlen_q == 1
        )
        yield row
        yield replace(row, window=1024)
        yield replace(row, seqlen_k=1024)


def shapes() -> Iterator[Workload]:
    """Other head dims and numbers of heads."""
    variants: tuple[dict[str, Any], ...] = (
        {"headdim": 64, "headdim_v": 64},
        {"headdim": 192, "headdim_v": 128},
        {"nheads_k": 32},
    )
    for dtype in ("bfloat16", "float32"):
        for variant in variants:
            yield replace(
                Workload("shapes", "prefill", dtype, seqlen_q=2048, seqlen_k=2048, unit="GFLOP/s"),
                **variant,
            )
            yield replace(
                Workload("shapes", "decode", dtype, seqlen_k=4096),
                quick=dtype == "bfloat16",
                **variant,
            )
    for batch_size in (1, 8):
        yield Workload(
            "shapes",
            "decode",
            batch_size=batch_size,
            nheads=16,
            nheads_k=1,
            headdim=64,
            headdim_v=512,
            qv=True,
            seqlen_k=4096,
            quick=batch_size == 8,
        )


CAPABILITIES = ("AMX", "AVX512_BF16", "AVX512", "AVX2", "portable")
RESTRICTED = ("sdpa:avx2", "sdpa:default")


def capability() -> Iterator[Workload]:
    """Ours on each instruction set against SDPA under the same restriction."""
    peers = (*(f"ours:{name}" for name in CAPABILITIES), "sdpa", *RESTRICTED)
    for dtype in ("bfloat16", "float32"):
        yield Workload(
            "capability",
            "prefill",
            dtype,
            seqlen_q=2048,
            seqlen_k=2048,
            unit="GFLOP/s",
            peers=peers,
        )
        yield Workload("capability", "decode", dtype, 8, seqlen_k=4096, peers=peers)


def scaling() -> Iterator[Workload]:
    peers = ("ours", "sdpa", "vllm")
    for seqlen_k in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        yield Workload("scaling", "decode", seqlen_k=seqlen_k, unit="ms", peers=peers)
    for batch_size in (2, 4, 8, 16, 32, 64):
        yield Workload(
            "scaling", "decode", batch_size=batch_size, seqlen_k=1024, unit="ms", peers=peers
        )


def memory() -> Iterator[Workload]:
    """Timed once, for the memory that the call takes beyond its output."""
    for seqlen_q, kind in ((1, "decode"), (512, "prefill")):
        for seqlen_k in (1024, 8192, 32768, 131072):
            yield Workload(
                "memory",
                kind,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                unit="ms",
                quick=seqlen_k == 131072,
                peers=("ours", "sdpa"),
            )
    for seqlen in (1024, 4096, 16384):
        yield Workload(
            "memory",
            "train",
            nheads=16,
            nheads_k=16,
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            unit="ms",
            peers=("ours", "sdpa"),
        )


GROUPS = {
    make.__name__: tuple(make())
    for make in (
        decode,
        tiny,
        prefill,
        varlen,
        train,
        window,
        shapes,
        capability,
        scaling,
        memory,
    )
}


@dataclass(frozen=True)
class Target:
    """What rows must reach: ratio times the best peer's speed, limit as a share of the DRAM read
    or of the arithmetic peak, at most `most` in the row's unit."""

    work: str
    group: str
    dtype: str = ""
    ratio: float = 0.0
    limit: float = 0.0
    most: float = 0.0
    aim: str = ""

    def covers(self, row: Workload) -> bool:
        return row.group == self.group and self.dtype in ("", row.dtype)


TARGETS = (
    Target("decode bf16", "decode", "bfloat16", ratio=1.1, aim="80 % of the limit"),
    Target("decode fp16", "decode", "float16", ratio=1.15, aim="1.5x"),
    Target("decode fp32", "decode", "float32", ratio=1.15, aim="1.5x"),
    Target("tiny: 1 x 128 bf16, whole call", "tiny", most=25, aim="15 us"),
    Target("prefill bf16", "prefill", "bfloat16", ratio=1.1, aim="1.5x"),
    Target("prefill fp32", "prefill", "float32", ratio=1.05, aim="1.15x"),
    Target("prefill fp16", "prefill", "float16", ratio=1.0, aim="1.1x"),
    Target("varlen", "varlen", ratio=1.1, aim="1.3x"),
    Target("forward + backward bf16", "train", "bfloat16", ratio=2.5, aim="3.5x"),
    Target("forward + backward fp32", "train", "float32", ratio=1.4, aim="1.8x"),
    Target("windows", "window", ratio=1.1, aim="1.3x"),
    Target("d 64, d 192/128, MLA, MHA", "shapes", ratio=1.1, aim="1.3x"),
)
