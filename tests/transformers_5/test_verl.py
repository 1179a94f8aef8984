"""veRL 0.9: its FSDP engine, of one process on CPU, gives each token of a rollout the bits that the
rollout saw."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import verl
import verl_on_cpu  # noqa: F401
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface
from transformers.models.qwen3 import modeling_qwen3
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.models.transformers.qwen2 import qwen2_attn_forward
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils, ulysses
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from fa3_ops import batch_invariant

EXTERNAL_LIB = "fa3_ops.integrations.verl.batch_invariant"
NEW_TOKENS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a model so wide that PyTorch's linear layers do depend on the number of rows."""
    path = str(tmp_path_factory.mktemp("verl"))
    tiny_models.make("qwen3", hidden_size=256, intermediate_size=768).save_pretrained(path)
    return path


@pytest.fixture(scope="class")
def one_process() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def engine_of(path: str, dtype: str, lora_rank: int = 0, **settings: Any) -> Any:
    """The engine that veRL's worker makes by such a configuration."""
    model = HFModelConfig(
        path=path,
        load_tokenizer=False,
        external_lib=EXTERNAL_LIB,
        override_config={"attn_implementation": "fa3npu"},
        lora_rank=lora_rank,
    )
    fsdp = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": dtype},
        use_torch_compile=False,
        **settings,
    )
    return EngineRegistry.new(
        model_type="language_model",
        backend=fsdp.strategy,
        model_config=model,
        engine_config=fsdp,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=4),
        checkpoint_config=CheckpointConfig(),
    )


def rollout(model: Any, seed: int) -> tuple[list[Tensor], Tensor]:
    """Sampled sequences, and the log-probabilities of their new tokens by veRL's formula, from
    decoding a left-padded batch token by token."""
    lengths = torch.arange(5) * 13 + 3
    live = (torch.arange(int(lengths.max())) >= (lengths.max() - lengths)[:, None]).long()
    ids = tiny_models.tokens(*live.shape, seed=seed) * live
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=live,
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, -NEW_TOKENS:]
    steps = zip(out.logits, new.unbind(1), strict=True)
    log_probs = [logprobs_from_logits(logits.to(model.dtype), ids) for logits, ids in steps]
    sequences = zip(out.sequences, lengths.tolist(), strict=True)
    return [ids[-length - NEW_TOKENS :] for ids, length in sequences], torch.stack(log_probs, 1)


def batch_of(sequences: list[Tensor], packed: bool) -> Any:
    """As veRL's trainer hands them to its engine, which makes micro-batches of them."""
    jagged = torch.nested.nested_tensor_from_jagged
    ids = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    tensors = {
        "input_ids": ids,
        "position_ids": jagged(positions, ids.offsets()),
        "loss_mask": jagged(torch.ones_like(positions), ids.offsets()),
    }
    settings = {
        "use_remove_padding": packed,
        "pad_mode": DatasetPadMode.NO_PADDING,
        "temperature": 1.0,
        "max_token_len_per_gpu": 130,
    }
    return tensordict_utils.get_tensordict(tensors, non_tensor_dict=settings)


def trained(engine: Any, sequences: list[Tensor], packed: bool) -> Tensor:
    """The log-probabilities of the new tokens, from the trainer."""
    with engine.eval_mode():
        output = engine.infer_batch(batch_of(sequences, packed))
    each = output["model_output"]["log_probs"].unbind()
    return torch.stack([log_probs[-NEW_TOKENS - 1 : -1] for log_probs in each])


def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
    return -model_output["log_probs"].values().mean(), {}


class TestPlugin:
    def test_registers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """veRL's import, and nothing of ours."""
        registered = "fa3_ops.integrations.transformers.registered"
        monkeypatch.delitem(sys.modules, registered)
        for name in ("fa3npu", "flash_fa3npu"):
            monkeypatch.delitem(AttentionInterface._global_mapping, name)
        importlib.reload(verl)
        assert {"fa3npu", "flash_fa3npu"} <= set(AttentionInterface().valid_keys())


@pytest.mark.usefixtures("one_process")
class TestEngine:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_of_the_rollout(self, path: str, dtype: str) -> None:
        """Before a training step and behind it, with and without padding removed."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="fa3npu", dtype=DTYPES[dtype]
        )
        batch_invariant.convert(model)
        engine = engine_of(path, dtype)
        engine.initialize()
        for seed in range(2):
            sequences, log_probs = rollout(model, seed)
            for packed in (True, False):
                assert torch.equal(trained(engine, sequences, packed), log_probs)
            with engine.train_mode():
                engine.train_batch(batch_of(sequences, packed=True), loss)
            model.load_state_dict(dict(engine.get_per_tensor_param()[0]))
        assert not torch.equal(trained(engine, sequences, packed=True), log_probs)

    def test_lora(self, path: str) -> None:
        """Its layers, too: those of seven projections, a pair each beside what they adapt."""
        engine = engine_of(path, "fp32", lora_rank=4)
        engine.initialize()
        linear = [layer for layer in engine.module.modules() if isinstance(layer, nn.Linear)]
        assert len(linear) == 2 * 7 * 3 + 1
        assert all(isinstance(layer, batch_invariant.Linear) for layer in linear)


@pytest.fixture
def two_processes() -> Iterator[None]:
    """As far as this one can tell, which is the first: what they exchange is made up."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    ulysses.set_ulysses_sequence_parallel_group(distributed.group.WORLD)
    yield
    ulysses.set_ulysses_sequence_parallel_group(None)
    distributed.destroy_process_group()


class TestRefusals:
    def test_ulysses(self, path: str) -> None:
        with pytest.raises(NotImplementedError, match="sequence_parallel_size must be 1, got 2"):
            engine_of(path, "fp32", ulysses_sequence_parallel_size=2)

    @pytest.mark.usefixtures("two_processes")
    def test_ulysses_without_our_engine(self) -> None:
        model = tiny_models.make("qwen3")
        apply_monkey_patch(model, ulysses_sp_size=2)
        with pytest.raises(NotImplementedError, match="sequence parallelism over 2 ranks"):
            model(tiny_models.tokens(1, 12), use_cache=False)

    @pytest.mark.usefixtures("one_process")
    def test_attention_of_its_own(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which veRL gives the models of images whose code it cannot import beside this release of
        transformers."""
        monkeypatch.setattr(modeling_qwen3.Qwen3Attention, "forward", qwen2_attn_forward)
        with pytest.raises(NotImplementedError, match=r"Qwen3Attention, .*verl\.models"):
            engine_of(path, "fp32").initialize()
