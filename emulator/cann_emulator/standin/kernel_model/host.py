"""What the raw extension for Ascend 910 does on the host: checks, tiling, launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .forward import Kernel
from .memory import Memory, cores, guarded, host, is_capturing, launch
from .tiling import BAND, BYTES, CAUSAL, NO_MASK, TILING, UNBOUNDED, ceil_div, fill, mask_of

FORWARD = """q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q
seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin
seqlens_rotary q_descale k_descale v_descale softmax_scale causal window_left window_right
attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin"""

METADATA = """batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim headdim_v
qkv_dtype cache_seqlens cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q cache_leftpad
page_size max_seqlen_k_new causal window_left window_right attention_chunk softcap num_splits
pack_gqa sm_margin softmax_scale"""

UNSUPPORTED = (
    "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale",
    "v_descale",
)  # fmt: skip

_triu_mask_made = False


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def named(names: str, args: tuple[object, ...]) -> SimpleNamespace:
    """Positional arguments by name; TypeError if their number is wrong, as of pybind11."""
    keys = names.split()
    if len(keys) != len(args):
        raise TypeError(f"incompatible function arguments: {len(args)} instead of {len(keys)}")
    return SimpleNamespace(**dict(zip(keys, args, strict=True)))


def check_forward(a: SimpleNamespace) -> None:
    """The checks that the releases share."""
    check(a.q.dtype in (torch.float16, torch.bfloat16), "only FP16 and BF16 are supported")
    for name in ("k", "v", "out"):
        x = getattr(a, name)
        check(x is None or x.dtype == a.q.dtype, f"q and {name} must have the same dtype")
    for name in ("q", "k", "v", "out", "page_table"):
        x = getattr(a, name)
        check(x is None or x.stride(-1) == 1, f"{name} must have contiguous last dimension")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "page_table"):
        x = getattr(a, name)
        check(x is None or x.dtype == torch.int32, f"{name} must have dtype int32")
        contiguous = x is None or not name.startswith("cu_") or x.is_contiguous()
        check(contiguous, f"{name} must be contiguous")
    check(a.cu_seqlens_q is None or a.max_seqlen_q is not None, "cu_seqlens_q needs max_seqlen_q")
    check(a.cu_seqlens_k is None or a.page_table is None, "cu_seqlens_k excludes a page table")
    for name in UNSUPPORTED:
        check(getattr(a, name) is None, f"NPU FlashAttention does not support {name}")
    check(a.attention_chunk == 0, "NPU FlashAttention does not support attention_chunk")
    check(not a.pack_gqa, "NPU FlashAttention does not support pack_gqa")
    check(a.softcap >= 0, "softcap must be non-negative (0.0 disables softcap)")
    check(batch_of(a)[0] > 0, "batch size must be positive")
    check(1 <= a.q.shape[-1] <= 256, "head dimension must be in [1, 256]")
    check(a.q.shape[-2] % a.k.shape[-2] == 0, "heads of key/value must divide heads of query")


def batch_of(a: SimpleNamespace) -> tuple[int, int]:
    """(sequences, longest q)."""
    if a.cu_seqlens_q is None:
        return a.q.shape[0], a.q.shape[1]
    return a.cu_seqlens_q.shape[0] - 1, a.max_seqlen_q


def shapes_of(a: SimpleNamespace) -> dict[str, int]:
    """The fields of a tiling that follow from shapes."""
    batch, max_q = batch_of(a)
    paged = a.page_table is not None
    return dict(
        batch=batch, heads=a.q.shape[-2], heads_k=a.k.shape[-2], headdim=a.q.shape[-1],
        headdim_v=a.q.shape[-1], page_size=a.k.shape[1] if paged else 128,
        pages_per_row=a.page_table.shape[1] if paged else 0, max_q=max_q,
    )  # fmt: skip


def lengths_on_host(a: SimpleNamespace, seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """(of q, of kv); waits for the device."""
    kv_lens = seqlens_k.cpu().tolist()
    if a.cu_seqlens_q is None:
        return [a.q.shape[1]] * a.q.shape[0], kv_lens
    return a.cu_seqlens_q.cpu().diff().tolist(), kv_lens


def check_splits(num_splits: int, paged_varlen: bool) -> None:
    check(0 <= num_splits <= cores(), f"num_splits must be in [0, {cores()}], 0 for auto")
    check(num_splits <= 1 or paged_varlen, "num_splits>1 needs a paged KV cache and varlen q")


@guarded(0)
def forward(*args: object) -> list[Tensor | None]:
    """mha_fwd of 0.4.2.post1. Nobody reads qv, cu_seqlens_k_new, seqused_q and kv_batch_idx."""
    a = named(FORWARD, args)
    check_forward(a)
    check(0 <= a.num_splits <= cores(), f"num_splits must be in [0, {cores()}], 0 for auto")
    batch, _ = batch_of(a)
    out = torch.empty_like(a.q) if a.out is None else a.out
    seqlens_k = a.seqused_k
    if seqlens_k is None and a.cu_seqlens_k is not None:
        seqlens_k = a.cu_seqlens_k[1:] - a.cu_seqlens_k[:-1]
    elif seqlens_k is None:
        seqlens_k = torch.full((batch,), a.k.shape[1], dtype=torch.int32, device=a.k.device)
    capacity = a.k.shape[1] * (1 if a.page_table is None else a.page_table.shape[1])
    if a.k_new is not None:
        _check_append(a, batch, capacity)
    lse = new_lse(a)

    if a.scheduler_metadata is None:
        t = _tiling_on_host(a, seqlens_k, capacity)
        mask, read_tiling = int(t["mask"]), lambda: t
    else:
        check(a.scheduler_metadata.nbytes == BYTES, "scheduler_metadata has the wrong size")
        bound = capacity if a.cu_seqlens_k is None else a.max_seqlen_k or 0
        mask = mask_of(a.causal, a.window_left, a.window_right, bound)[0]
        read_tiling = tiling_in(a.scheduler_metadata)
    if mask != NO_MASK:
        make_triu_mask(a.q.device)
    kv_lens = seqlens_k if a.cu_seqlens_k is None else a.cu_seqlens_k
    if a.cu_seqlens_k is None and a.page_table is None and a.cu_seqlens_q is not None:
        kv_lens = torch.zeros(batch + 1, dtype=torch.int32)
        kv_lens[1:] = seqlens_k.cpu().cumsum(0)
    cleared = a.scheduler_metadata is None
    launch_forward(a, read_tiling, out, lse, kv_lens, mask, "910", partials_cleared=cleared)
    return [out, lse, None, None]


def new_lse(a: SimpleNamespace) -> Tensor:
    *batch, rows, heads, _ = a.q.shape
    lse = torch.empty((*batch, heads, rows), dtype=torch.float32, device=a.q.device)
    return lse.fill_(math.inf)


def launch_forward(
    a: SimpleNamespace,
    read_tiling: Callable[[], np.ndarray],
    out: Tensor,
    lse: Tensor,
    kv_lens: Tensor,
    mask: int,
    kind: str,
    partials_cleared: bool = True,
) -> None:
    """The kernel reads lengths, page table and tiling when it runs, not now."""
    tensors = dict(
        q=a.q, k=a.k, v=a.v, out=out, lse=lse, kv_lens=kv_lens, cu_q=a.cu_seqlens_q,
        page_table=a.page_table, k_new=a.k_new, v_new=a.v_new,
    )  # fmt: skip
    memory = {name: None if x is None else Memory(x) for name, x in tensors.items()}
    flags = dict(mask=mask, softcap=a.softcap > 0, kind=kind, partials_cleared=partials_cleared)
    launch(a.q.device, lambda: Kernel(read_tiling(), **memory, **flags).run())


def _check_append(a: SimpleNamespace, batch: int, capacity: int) -> None:
    check(a.cu_seqlens_k is None, "append-KV does not support cu_seqlens_k")
    rows = batch if a.page_table is None else a.page_table.shape[0]
    check(rows == batch, "append-KV: page_table needs a row for each sequence")
    check(a.v_new is not None, "append-KV: v_new must be provided together with k_new")
    check(a.seqused_k is not None, "append-KV requires seqused_k")
    check(a.k_new.dtype == a.v_new.dtype == a.q.dtype, "k_new/v_new: dtype must be that of q")
    check(a.k_new.dim() == a.v_new.dim() == 4, "append-KV k_new/v_new must be (b, s_new, h_k, d)")
    new = a.k_new.shape[1]
    shape = (batch, new, a.k.shape[-2], a.q.shape[-1])
    check(a.k_new.shape == a.v_new.shape == shape, "k_new/v_new shape mismatch")
    check(new > 0, "append-KV requires a uniform new length s_new > 0")
    check(a.q.shape[-1] % 16 == 0, "append-KV requires head dim to be a multiple of 16")
    for length in a.seqused_k.cpu().tolist():
        fits = 0 <= length <= capacity - new
        check(fits, f"append-KV: {length} + {new} exceeds cache capacity {capacity}")


def _tiling_on_host(a: SimpleNamespace, seqlens_k: Tensor, capacity: int) -> np.ndarray:
    new = 0 if a.k_new is None else a.k_new.shape[1]
    q_lens, kv_lens = lengths_on_host(a, seqlens_k)
    mask = mask_of(a.causal, a.window_left, a.window_right, max(kv_lens) + new)
    check(new == 0 or mask[0] != BAND, "append-KV does not support sliding-window attention")
    paged_varlen = a.page_table is not None and a.cu_seqlens_q is not None
    check_splits(a.num_splits, paged_varlen)
    fixed = shapes_of(a) | dict(new=new, capacity=capacity if new else 0)
    # The real host leaves the scale undefined when it is not given.
    scale = math.nan if a.softmax_scale is None else a.softmax_scale
    t = new_tiling(fixed, mask, scale, a.softcap)
    fill(t, q_lens, kv_lens, paged_varlen=paged_varlen, num_splits=a.num_splits, cores=cores())
    return t


def tiling_in(scheduler_metadata: Tensor) -> Callable[[], np.ndarray]:
    check(scheduler_metadata.dtype == torch.uint8, "scheduler_metadata must be a byte tensor")
    check(scheduler_metadata.is_contiguous(), "scheduler_metadata must be contiguous")
    content = host(scheduler_metadata)[:BYTES]
    return lambda: content.numpy().view(TILING)[0]


def new_tiling(
    fixed: dict[str, int], mask: tuple[int, int, int], scale: float, softcap: float
) -> np.ndarray:
    t = np.zeros(1, TILING)[0]
    for name, value in fixed.items():
        t[name] = value
    t["mask"], t["window_left"], t["window_right"] = mask
    t["scale"], t["softcap"] = scale / softcap if softcap > 0 else scale, softcap
    return t


def make_triu_mask(device: torch.device) -> None:
    """The first masked call of a process fills a mask on every device and waits for them all."""
    global _triu_mask_made
    if not _triu_mask_made and device.type != "cpu":
        for index in range(torch.npu.device_count()):
            with torch.npu.device(index):
                torch.npu.current_stream().synchronize()
        _triu_mask_made = True


@guarded(8)
def get_scheduler_metadata(*args: object) -> Tensor:
    """The tiling as uint8[2384], from lengths that stay on the device."""
    a = named(METADATA, args)
    paged_varlen = a.page_size is not None and a.cu_seqlens_q is not None
    check_splits(a.num_splits, paged_varlen)
    check(a.softcap >= 0, "softcap must be non-negative (0.0 disables softcap)")
    scale = a.headdim**-0.5 if a.softmax_scale is None else a.softmax_scale
    mask, left, right = mask_of(a.causal, a.window_left, a.window_right, a.max_seqlen_k)
    size = a.page_size or 128
    fixed = dict(
        batch=a.batch_size, heads=a.num_heads_q, heads_k=a.num_heads_kv, headdim=a.headdim,
        headdim_v=a.headdim_v, page_size=size,
        pages_per_row=ceil_div(a.max_seqlen_k, size) if a.page_size else 0, max_q=a.max_seqlen_q,
        new=max(a.max_seqlen_k_new, 0), capacity=a.max_seqlen_k,
    )  # fmt: skip

    def compute(q_lens: list[int], kv_lens: list[int]) -> np.ndarray:
        # Refined by the true lengths; but a kernel launched for a band keeps to one.
        refined = mask_of(mask == CAUSAL, left, right, max(kv_lens) + fixed["new"])
        if mask == BAND and refined[0] == CAUSAL:
            refined = BAND, UNBOUNDED, 0
        t = new_tiling(fixed, refined, scale, a.softcap)
        splits = dict(paged_varlen=paged_varlen and mask != BAND, num_splits=a.num_splits)
        fill(t, q_lens, kv_lens, **splits, cores=cores())
        return t

    metadata = torch.empty(BYTES, dtype=torch.uint8, device=a.cache_seqlens.device)
    return launch_metadata(a, metadata, compute)


def launch_metadata(
    a: SimpleNamespace,
    metadata: Tensor,
    compute: Callable[[list[int], list[int]], np.ndarray],
    cumulative: bool = False,
) -> Tensor:
    """Writes compute(q_lens, kv_lens) to metadata, and cumulative kv lengths after it."""
    for name in ("cache_seqlens", "cu_seqlens_q", "cu_seqlens_k"):
        x = getattr(a, name)
        check(x is None or x.dtype == torch.int32, f"{name} must have dtype int32")
    # The real one uses a second stream and events; whether a graph captures them is not known.
    check(not is_capturing(metadata.device), "scheduler metadata cannot be made in a capture")
    content, batch = host(metadata), a.batch_size
    kv_from = Memory(a.cache_seqlens if a.cu_seqlens_k is None else a.cu_seqlens_k)
    cu_q = None if a.cu_seqlens_q is None else Memory(a.cu_seqlens_q)

    def kernel() -> None:
        ends = torch.arange(batch + 1)
        kv_lens = (kv_from[ends[:-1]] if a.cu_seqlens_k is None else kv_from[ends].diff()).tolist()
        q_lens = [a.max_seqlen_q] * batch if cu_q is None else cu_q[ends].diff().tolist()
        t = compute(q_lens, kv_lens)
        content[:BYTES] = torch.from_numpy(t.reshape(1).view(np.uint8))
        if cumulative:
            content[BYTES:].view(torch.int32)[:] = torch.tensor([0, *kv_lens]).cumsum(0)

    launch(metadata.device, kernel)
    return metadata
