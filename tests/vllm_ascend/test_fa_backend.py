"""vLLM-Ascend's AscendFABackend as it is released, over compat/flash_attn_npu_v3: its metadata
builder, its write to the cache and its calls, against our operators on CPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import flash_attn_npu_v3
import pytest
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_ascend.attention import fa3_v1
from vllm_ascend.attention.attention_v1 import AscendAttentionState
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata

import fa3_ops

NHEADS, NHEADS_K, HEADDIM, PAGE_SIZE, NUM_PAGES = 8, 2, 64, 128, 24
LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0, layer_name="model.layers.0.attn")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")  # of float32


def config_of(speculative_tokens: int = 0) -> Any:
    """The parts of a VllmConfig that the backend reads."""
    speculative = SimpleNamespace(
        num_speculative_tokens=speculative_tokens, parallel_drafting=False
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(
            enforce_eager=True, max_model_len=1024, runner_type="generate", use_mla=False
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        compilation_config=SimpleNamespace(),
        speculative_config=speculative if speculative_tokens else None,
        kv_transfer_config=None,
        quant_config=None,
        additional_config=None,
    )


@dataclass
class Step:
    """What the model runner holds of one step, on CPU: decodes before prefills. dummy_rows are
    padding tokens, which the runner makes a request of their own in query_start_loc only."""

    query_lens: list[int]
    seq_lens: list[int]
    dtype: torch.dtype = torch.bfloat16
    dummy_rows: int = 0
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tokens = sum(self.query_lens)
        self.q = torch.randn(tokens + self.dummy_rows, NHEADS, HEADDIM).to(self.dtype)
        self.k, self.v = torch.randn(2, tokens, NHEADS_K, HEADDIM).to(self.dtype)
        self.cache = torch.randn(2, NUM_PAGES, PAGE_SIZE, NHEADS_K, HEADDIM).to(self.dtype)
        offsets = [0, *torch.tensor(self.query_lens).cumsum(0).tolist()]
        self.query_start_loc = torch.tensor(offsets, dtype=torch.int32)
        self.block_table = torch.randperm(NUM_PAGES)[: 5 * len(offsets[1:])].int().view(-1, 5)

    @property
    def slots(self) -> Tensor:
        slots = []
        for pages, new, total in zip(self.block_table, self.query_lens, self.seq_lens, strict=True):
            at = torch.arange(total - new, total)
            slots.append(pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
        return torch.cat(slots).int()

    def written(self) -> Tensor:
        """The cache with the new keys and values."""
        cache = self.cache.clone()
        for side, new in zip(cache, (self.k, self.v), strict=True):
            side.view(-1, NHEADS_K, HEADDIM)[self.slots.long()] = new
        return cache

    def expected(self, causal: bool = True) -> Tensor:
        """Our operator on CPU, in one call."""
        return fa3_ops.flash_attn_varlen_func(
            self.q[: sum(self.query_lens)],
            *self.written(),
            self.query_start_loc,
            None,
            max(self.query_lens),
            max(self.seq_lens),
            seqused_k=torch.tensor(self.seq_lens, dtype=torch.int32),
            block_table=self.block_table,
            causal=causal,
        )

    def common_metadata(self) -> AscendCommonAttentionMetadata:
        starts = self.query_start_loc
        if self.dummy_rows:
            starts = torch.cat([starts, starts[-1:] + self.dummy_rows])
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        return AscendCommonAttentionMetadata(
            query_start_loc=starts.npu(),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.npu(),
            seq_lens_cpu=seq_lens,
            _seq_lens_cpu=seq_lens,
            num_reqs=len(starts) - 1,
            num_actual_tokens=sum(self.query_lens),
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens),
            block_table_tensor=self.block_table.npu(),
            slot_mapping=self.slots.npu(),
            attn_state=AscendAttentionState.ChunkedPrefill,
        )


def run(step: Step, speculative_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """What the backend gives to the tokens of the step, and the cache afterwards."""
    backend, config = fa3_v1.AscendFABackend, config_of(speculative_tokens)
    spec = FullAttentionSpec(
        block_size=PAGE_SIZE, num_kv_heads=NHEADS_K, head_size=HEADDIM, dtype=step.dtype
    )
    cache = step.cache.npu()
    out = torch.zeros_like(step.q, device="npu")
    with set_current_vllm_config(config):
        builder = backend.get_builder_cls()(spec, [LAYER.layer_name], config, cache.device)
        impl = backend.get_impl_cls()(
            *(NHEADS, HEADDIM, HEADDIM**-0.5, NHEADS_K, None, None, "auto", None),
            *(AttentionType.DECODER, None),
        )
        metadata = builder.build(0, step.common_metadata())
        padding = torch.zeros(step.dummy_rows, NHEADS_K, HEADDIM, dtype=step.dtype)
        k, v = (torch.cat([new, padding]).npu() for new in (step.k, step.v))
        impl.forward(LAYER, step.q.npu(), k, v, cache, metadata, out)
    return out.cpu()[: sum(step.query_lens)], cache.cpu()


def test_it_is_what_vllm_ascend_chooses() -> None:
    wanted = AttentionSelectorConfig(
        HEADDIM, torch.bfloat16, "auto", PAGE_SIZE, use_batch_invariant=True
    )
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, wanted)
    assert chosen == "vllm_ascend.attention.fa3_v1.AscendFABackend"
    assert fa3_v1._fa3_fn is flash_attn_npu_v3.flash_attn_with_kvcache


STEPS = {
    "prefill": ([200, 65], [200, 65]),
    "chunked prefill": ([40, 100], [300, 100]),
    "decode": ([1, 1, 1], [200, 65, 1]),
    "mixed": ([1, 1, 30, 129], [200, 65, 90, 129]),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str, dtype: torch.dtype) -> None:
    step = Step(*STEPS[name], dtype)
    out, cache = run(step)
    atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, step.expected(), rtol=atol, atol=atol)
    assert torch.equal(cache, step.written())


@pytest.mark.parametrize("decodes", [0, 2])
def test_padding_tokens_are_a_request_of_their_own(decodes: int) -> None:
    """The runner takes max_seqlen_q from the real requests: 2 tokens beside 6 of padding."""
    step = Step([1] * decodes + [2], [200] * decodes + [2], dummy_rows=6)
    out, cache = run(step)
    torch.testing.assert_close(out, step.expected(), rtol=2e-2, atol=2e-2)
    assert torch.equal(cache, step.written())


def test_a_row_has_the_same_bits_in_any_step() -> None:
    """What the backend is chosen for: a prompt at once, in chunks, and beside others."""
    whole = Step([300, 65], [300, 65])
    out, cache = run(whole)
    chunk = Step([1, 100], [65, 300])
    chunk.cache, chunk.block_table = cache, whole.block_table[[1, 0]]
    for side in ("q", "k", "v"):
        rows = getattr(whole, side)
        setattr(chunk, side, torch.cat([rows[364:], rows[200:300]]))
    again, _ = run(chunk)
    assert torch.equal(again, torch.cat([out[364:], out[200:300]]))


def test_speculative_tokens_see_those_after_them_and_it_is_said() -> None:
    """The release asks for causal=False: it has a meaning, so it is done, and warned of."""
    step = Step([3, 3], [200, 65])
    with pytest.warns(UserWarning, match="decoding wants causal=True"):
        out, _ = run(step, speculative_tokens=2)
    torch.testing.assert_close(out, step.expected(causal=False), rtol=2e-2, atol=2e-2)
    last = torch.tensor([2, 5])  # rows that see all keys either way
    torch.testing.assert_close(out[last], step.expected()[last], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(out, step.expected(), rtol=2e-2, atol=2e-2)


def test_a_block_table_sliced_by_tokens_is_an_error() -> None:
    """Beside prefills: whose rows are left cannot be told, so nothing is guessed."""
    step = Step([3, 3, 40], [200, 65, 40])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="slice it by requests"):
        warnings.simplefilter("ignore", UserWarning)
        run(step, speculative_tokens=2)
