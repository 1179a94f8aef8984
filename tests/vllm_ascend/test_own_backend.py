"""Our own backend for vLLM-Ascend, its classes driven as vLLM-Ascend's model runner drives them: on
stable tensors of the largest batch, of which a step pads what it uses."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm_ascend.ops  # noqa: F401  # first: the rest of it imports in circles
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.utils import CpuGpuBuffer
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

import fa3_ops
from fa3_ops.integrations import vllm as plugin
from fa3_ops.integrations.vllm.ascend import Fa3AscendBackend

HEADS, HEADS_K, D, PAGE, COLUMNS, MOST = 4, 2, 64, 128, 5, 6
NUM_PAGES = MOST * COLUMNS + 1
CAPTURE_SIZES = (1, 2, 4, 8, 16)
HALF = torch.float16
SPEC = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS_K, head_size=D, dtype=HALF)
LAYER = "model.layers.0.self_attn.attn"
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 200},
    "softcap": {"logits_soft_cap": 5.0},
    "scale": {"scale": 0.3},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape).to(HALF)


def config_of(layers: dict[str, Any], **parallel: int) -> Any:
    """The parts of a VllmConfig that the backend reads."""
    sizes = {"prefill_context_parallel_size": 1, "decode_context_parallel_size": 1} | parallel
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=MOST),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=list(CAPTURE_SIZES), static_forward_context=layers
        ),
        parallel_config=SimpleNamespace(**sizes),
        kv_transfer_config=None,
    )


def layer_of(config: Any = None, **arguments: Any) -> Any:
    given = {"num_heads": HEADS, "head_size": D, "scale": D**-0.5, "num_kv_heads": HEADS_K}
    with set_current_vllm_config(config or config_of({})):
        return Fa3AscendBackend.get_impl_cls()(**given | arguments)


class Runner:
    """One layer, its cache, and what vLLM-Ascend's runner owns."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        on_npu = {n: x.npu() if isinstance(x, Tensor) else x for n, x in arguments.items()}
        self.layer = layer_of(**on_npu)
        config = config_of({LAYER: SimpleNamespace(impl=self.layer)})
        builder = Fa3AscendBackend.get_builder_cls()
        self.builder = builder(SPEC, [LAYER], config, torch.device("npu:0"))
        shape = Fa3AscendBackend.get_kv_cache_shape(NUM_PAGES, PAGE, HEADS_K, D)
        torch.manual_seed(0)
        self.cache = rand(*shape).npu()
        self.offsets = CpuGpuBuffer(
            MOST + 2, dtype=torch.int32, device=torch.device("npu:0"), pin_memory=False
        )
        self.seq_lens = torch.zeros(MOST, dtype=torch.int32).npu()
        self.block_table = torch.zeros(MOST, COLUMNS, dtype=torch.int32).npu()
        self.slot_mapping = torch.zeros(max(CAPTURE_SIZES) * 50, dtype=torch.int64).npu()
        # vLLM-Ascend's runner pads offsets by this.
        self.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL)
        self.uniform_decode_query_len = 1
        self.arange_np = np.arange(MOST + 2, dtype=np.int32)

    def common(self, batch: Batch, padded: int) -> AscendCommonAttentionMetadata:
        """The batch, padded to so many tokens."""
        n, tokens = len(batch.q_lens), sum(batch.q_lens)
        self.offsets.np[: n + 1] = np.cumsum([0, *batch.q_lens])
        self.offsets.np[n + 1 :] = tokens
        requests = NPUModelRunner._pad_query_start_loc_for_fia(
            self, self.offsets, padded, n, n, CUDAGraphMode.FULL, None
        )
        self.seq_lens[:n].copy_(torch.tensor(batch.kv_lens, dtype=torch.int32))
        self.block_table[:n].copy_(batch.block_table)
        self.slot_mapping[:tokens].copy_(batch.slots)
        self.slot_mapping[tokens:padded].fill_(-1)
        return AscendCommonAttentionMetadata(
            query_start_loc=self.offsets.gpu[: requests + 1],
            query_start_loc_cpu=self.offsets.cpu[: requests + 1],
            seq_lens=self.seq_lens[:requests],
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(batch.q_lens),
            max_seq_len=max(batch.kv_lens),
            block_table_tensor=self.block_table[:requests],
            slot_mapping=self.slot_mapping[:padded],
            num_input_tokens=padded,
        )

    def forward(self, metadata: Any, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        out = torch.full_like(q, float("nan"))
        self.layer.forward(SimpleNamespace(), q, k, v, self.cache, metadata, out)
        return out


class Batch:
    """Requests of a step: how many new tokens each has, and how many keys with them."""

    def __init__(self, q_lens: list[int], kv_lens: list[int]) -> None:
        self.q_lens, self.kv_lens, tokens = q_lens, kv_lens, sum(q_lens)
        self.q, self.k, self.v = (rand(tokens, h, D) for h in (HEADS, HEADS_K, HEADS_K))
        pages = torch.randperm(NUM_PAGES - 1)[: len(q_lens) * COLUMNS] + 1
        self.block_table = pages.int().view(len(q_lens), COLUMNS)
        positions = [(b, j) for b, (q, k) in enumerate(self.pairs) for j in range(k - q, k)]
        self.slots = torch.tensor(
            [int(self.block_table[b, j // PAGE]) * PAGE + j % PAGE for b, j in positions]
        )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.q_lens, self.kv_lens, strict=True))

    @staticmethod
    def drawn(most_tokens: int) -> Batch:
        """Decodes, speculation, prefills and chunks, in any order."""
        q_lens: list[int] = []
        for _ in range(int(torch.randint(1, MOST + 1, ()))):
            left = most_tokens - sum(q_lens)
            if left:
                q_lens.append(int(torch.randint(1, left + 1, ())) if left < 9 else 1)
        kv_lens = [q + int(torch.randint(0, COLUMNS * PAGE - q, ())) for q in q_lens]
        return Batch(q_lens, kv_lens)

    def padded(self, name: str, size: int) -> Tensor:
        x = getattr(self, name)
        return torch.cat((x, x.new_full((size - len(x), *x.shape[1:]), float("nan")))).npu()

    def on_cpu(self, cache: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the CPU operators give, and the cache after it."""
        cache = cache.clone()
        fa3_ops.kvcache_scatter_(self.k, self.v, cache[0], cache[1], self.slots)
        window = arguments.get("sliding_window")
        out = fa3_ops.flash_attn_with_kvcache(
            *(self.q, cache[0], cache[1]),
            cache_seqlens=torch.tensor(self.kv_lens, dtype=torch.int32),
            page_table=self.block_table,
            cu_seqlens_q=torch.tensor([0, *self.q_lens]).cumsum(0).int(),
            max_seqlen_q=max(self.q_lens),
            softmax_scale=arguments.get("scale", D**-0.5),
            causal=True,
            window_size=(-1 if window is None else window - 1, -1),
            softcap=arguments.get("logits_soft_cap", 0.0),
            sinks=arguments.get("sinks"),
        )
        return out, cache


@pytest.mark.parametrize("name", LAYERS)
def test_eager_batches_as_on_cpu(name: str) -> None:
    torch.manual_seed(1)
    runner = Runner(LAYERS[name])
    batches = [
        Batch([300, 65], [300, 65]),  # prefill
        Batch([40, 100], [300, 100]),  # of which the first is a chunk
        Batch([1, 1, 1], [200, 65, 1]),  # decode
        Batch([30, 1, 1, 4], [90, 500, 7, 400]),  # mixed, with speculation
        *(Batch.drawn(60) for _ in range(6)),
    ]
    for batch in batches:
        tokens = sum(batch.q_lens)
        want, cache = batch.on_cpu(runner.cache.cpu(), LAYERS[name])
        metadata = runner.builder.build(0, runner.common(batch, tokens))
        out = runner.forward(metadata, batch.q.npu(), batch.k.npu(), batch.v.npu()).cpu()
        torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
        assert torch.equal(runner.cache.cpu(), cache)


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_of_every_size_replayed_with_changing_requests(name: str) -> None:
    torch.manual_seed(2)
    graphed, eager = Runner(LAYERS[name]), Runner(LAYERS[name])
    static = {
        size: [torch.zeros(size, h, D, dtype=HALF).npu() for h in (HEADS, HEADS_K, HEADS_K)]
        for size in CAPTURE_SIZES
    }
    graphs, results = {}, {}
    for size in reversed(CAPTURE_SIZES):  # as vLLM captures
        requests = min(size, MOST)
        q_lens = [size // requests] * (requests - 1)
        q_lens.append(size - sum(q_lens))
        dummy = Batch(q_lens, [max(q, 3) for q in q_lens])
        dummy.slots.fill_(-1)
        metadata = graphed.builder.build_for_cudagraph_capture(graphed.common(dummy, size))
        graphed.forward(metadata, *static[size])
        graphs[size] = torch.npu.NPUGraph()
        with torch.npu.graph(graphs[size]):
            results[size] = graphed.forward(metadata, *static[size])
    used = set()
    for _ in range(25):
        batch = Batch.drawn(int(torch.randint(1, max(CAPTURE_SIZES) + 1, ())))
        tokens = sum(batch.q_lens)
        size = min(size for size in CAPTURE_SIZES if size >= tokens)
        used.add(size)
        graphed.builder.build(0, graphed.common(batch, size))
        for x, part in zip(static[size], "qkv", strict=True):
            x.copy_(batch.padded(part, size))
        graphs[size].replay()
        metadata = eager.builder.build(0, eager.common(batch, tokens))
        want = eager.forward(metadata, batch.q.npu(), batch.k.npu(), batch.v.npu()).cpu()
        out = results[size].cpu()
        if name == "sinks":  # counted by torch operators, whose bits may depend on the shape
            torch.testing.assert_close(out[:tokens], want, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(out[:tokens], want)
        assert (out[tokens:] == 0).all()
        assert torch.equal(graphed.cache.cpu(), eager.cache.cpu())
    assert used == set(CAPTURE_SIZES)


def test_one_schedule_a_step_for_all_layers_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    ours = fa3_ops.get_scheduler_metadata
    monkeypatch.setattr(
        fa3_ops, "get_scheduler_metadata", lambda **call: made.append(call) or ours(**call)
    )
    runner = Runner({})
    names = ["window", "plain", "plain", "window"]
    layers = {f"{i}": SimpleNamespace(impl=layer_of(**LAYERS[n])) for i, n in enumerate(names)}
    builder = type(runner.builder)(SPEC, list(layers), config_of(layers), torch.device("npu:0"))
    metadata = builder.build(0, runner.common(Batch([1, 1, 2], [5, 6, 9]), 16))
    assert [call["batch_size"] for call in made] == [3, 3]  # of the 4 with vLLM-Ascend's dummy
    assert {call["window_size"] for call in made} == {(199, 0), (-1, 0)}
    assert metadata.schedules.keys() == {layer.impl.scores for layer in layers.values()}


def test_a_layer_that_shares_keys_writes_none() -> None:
    runner = Runner({"kv_sharing_target_layer_name": "model.layers.7.self_attn.attn"})
    batch = Batch([1], [9])
    before = runner.cache.cpu()
    metadata = runner.builder.build(0, runner.common(batch, 1))
    out = runner.forward(metadata, batch.q.npu(), batch.k.npu(), batch.v.npu())
    assert torch.equal(runner.cache.cpu(), before)
    assert torch.equal(out, runner.forward(metadata, batch.q.npu(), None, None))


def test_a_warm_up_without_metadata_gives_zeros() -> None:
    q = rand(3, HEADS, D).npu()
    assert (Runner({}).forward(None, q, None, None).cpu() == 0).all()


def test_graphs_are_supported_for_all_batches() -> None:
    builder = Fa3AscendBackend.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    runner = Runner({})
    with pytest.raises(NotImplementedError, match="graphs of draft models"):
        runner.builder.build_for_graph_capture(runner.common(Batch([1], [1]), 1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"alibi_slopes": [0.5] * HEADS}, "alibi_slopes"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype int8"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type AttentionType.ENCODER_ONLY"),
    ],
)
def test_a_layer_is_refused_when_it_is_made(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"does not serve {text}: leave --attention-backend"):
        layer_of(**arguments)


@pytest.mark.parametrize("what", ["prefill_context", "decode_context", "connector"])
def test_a_deployment_is_refused_when_a_layer_is_made(what: str) -> None:
    config = config_of({})
    if what == "connector":
        config.kv_transfer_config = SimpleNamespace()
        text = "a KV connector"
    else:
        setattr(config.parallel_config, f"{what}_parallel_size", 2)
        text = f"{what.replace('_', ' ')} parallelism"
    with pytest.raises(ValueError, match=text):
        layer_of(config)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM-Ascend's, with our plugin, which does not stay."""
    theirs = type(current_platform)
    for name in ("get_attn_backend_cls", "check_and_update_config"):
        monkeypatch.setattr(theirs, name, theirs.__dict__[name])
    plugin.register()
    return theirs


def selecting(**changes: Any) -> AttentionSelectorConfig:
    defaults = {"head_size": D, "dtype": HALF, "kv_cache_dtype": "auto", "block_size": PAGE}
    return AttentionSelectorConfig(**defaults | changes)


def test_the_plugin_answers_custom_alone(platform: Any) -> None:
    with set_current_vllm_config(VllmConfig()):
        path = platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, selecting())
        assert path == f"{Fa3AscendBackend.__module__}.{Fa3AscendBackend.__qualname__}"
        theirs = "vllm_ascend.attention.attention_v1.AscendAttentionBackend"
        assert platform.get_attn_backend_cls(None, selecting()) == theirs
        # As vLLM calls it.
        named = {"attn_selector_config": selecting(), "num_heads": 4}
        assert platform.get_attn_backend_cls(None, **named) == theirs
        assert platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, **named) == path
        mla = platform.get_attn_backend_cls(None, selecting(use_mla=True))
        assert mla == "vllm_ascend.attention.mla_v1.AscendMLABackend"


@pytest.mark.parametrize("asked", [None, "CUSTOM", "TRITON_ATTN"])
def test_custom_outlives_the_update_of_the_configuration(asked: str | None) -> None:
    """vLLM-Ascend takes back what it does not know, where there is a model to configure."""

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            vllm_config.attention_config.backend = None

        get_attn_backend_cls = check_and_update_config

    plugin._serve_ascend(Platform)
    backend = None if asked is None else AttentionBackendEnum[asked]
    config: Any = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
    Platform.check_and_update_config(config)
    assert config.attention_config.backend is (backend if asked == "CUSTOM" else None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"attn_type": AttentionType.ENCODER}, "attention type .*ENCODER not supported"),
    ],
)
def test_the_plugin_refuses_by_name(platform: Any, changes: dict[str, Any], text: str) -> None:
    config = selecting(**copy.copy(changes))
    with pytest.raises(ValueError, match=text):
        platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
