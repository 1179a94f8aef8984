"""What is not served is refused by its name, before a number is wrong; who says what is causal."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

import fa3_ops
from fa3_ops.integrations.transformers.attention import attention


def forward(name: str = "qwen3", train: bool = False, settings: Any = None, **given: Any) -> Any:
    model = tiny_models.make(name, **settings or {}).train(train)
    return model(input_ids=tiny_models.tokens(2, 12), use_cache=False, **given)


class TestArguments:
    def test_dropout(self) -> None:
        settings = {"attention_dropout": 0.1}
        forward(settings=settings)
        with pytest.raises(NotImplementedError, match=r"dropout must be 0 in training, got 0\.1"):
            forward(settings=settings, train=True)

    def test_weights(self) -> None:
        with pytest.raises(NotImplementedError, match="output_attentions"):
            forward(output_attentions=True)

    def test_bias(self) -> None:
        config = transformers.T5Config(
            vocab_size=tiny_models.VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=1,
            num_heads=4,
        )
        model = tiny_models.build(transformers.T5EncoderModel, config, "fa3npu")
        with pytest.raises(NotImplementedError, match="position_bias"):
            model(input_ids=tiny_models.tokens(1, 12))

    def test_block_tables(self) -> None:
        with pytest.raises(NotImplementedError, match="set max_blocks_per_request=0"):
            forward(block_table=torch.zeros(2, 1, dtype=torch.int32))


class TestCausality:
    def test_the_call_decides(self) -> None:
        """Before the module: transformers passes is_causal where its mask says it all."""
        module = torch.nn.Module()
        module.is_causal = True
        states = torch.randn(3, 1, 2, 5, 16).unbind()
        results = [attention(module, *states, None, is_causal=said)[0] for said in (None, False)]
        wants = [
            fa3_ops.flash_attn_func(*(x.transpose(1, 2) for x in states), causal=causal)
            for causal in (True, False)
        ]
        assert all(torch.equal(out, want) for out, want in zip(results, wants, strict=True))


class TestMasks:
    def test_dense(self) -> None:
        with pytest.raises(NotImplementedError, match=r"shape \(2, 1, 12, 12\)"):
            forward(attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool).tril())

    @pytest.mark.parametrize("name", ["qwen3", "mistral", "bert"])
    def test_holes(self, name: str) -> None:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 5] = 0
        model = tiny_models.make(name)
        with pytest.raises(NotImplementedError, match="zeros in between"):
            model(input_ids=tiny_models.tokens(2, 12), attention_mask=mask)

    def test_own_mask_functions(self) -> None:
        for argument in ("or_mask_function", "and_mask_function"):
            with pytest.raises(NotImplementedError, match=argument):
                causal_mask(**{argument: masking_utils.causal_mask_function})

    def test_images(self) -> None:
        """Tokens of one image see each other; a single one is as any other."""
        blocks = torch.full((1, 12), -1)
        blocks[0, 4] = 0
        causal_mask(block_sequence_ids=blocks)
        blocks[0, 4:6] = 0
        with pytest.raises(NotImplementedError, match="images"):
            causal_mask(block_sequence_ids=blocks)

    def test_gemma3(self) -> None:
        """Its text is causal, its images are not."""
        config = transformers.Gemma3Config(**tiny_models.GEMMA3)
        model = tiny_models.build(transformers.Gemma3Model, config, "fa3npu")
        ids, types = tiny_models.tokens(1, 12), torch.zeros(1, 12, dtype=torch.long)
        model(input_ids=ids)
        types[0, 4:8] = 1
        with pytest.raises(NotImplementedError, match="images"):
            model(input_ids=ids, token_type_ids=types)

    def test_embedding_gemma(self) -> None:
        """Gemma-3 as an encoder, whose window is an or_mask_function."""
        _, _, settings = tiny_models.DECODERS["gemma3"]
        config = transformers.Gemma3TextConfig(**settings, use_bidirectional_attention=True)
        model = tiny_models.build(transformers.Gemma3TextModel, config, "fa3npu")
        with pytest.raises(NotImplementedError, match="or_mask_function"):
            model(tiny_models.tokens(1, 12))

    def test_chunks(self) -> None:
        """As long as all is in the first chunk, it is a causal mask."""
        assert chunked_mask(12) is None
        with pytest.raises(NotImplementedError, match="chunked"):
            chunked_mask(8)


def config() -> Any:
    return tiny_models.make("qwen3").config


def causal_mask(**differences: Any) -> Tensor | None:
    embeddings = torch.zeros(1, 12, 64)
    return masking_utils.create_causal_mask(config(), embeddings, None, None, **differences)


def chunked_mask(size: int) -> Tensor | None:
    chunked = config()
    chunked.attention_chunk_size = size
    return masking_utils.create_chunked_causal_mask(chunked, torch.zeros(1, 12, 64), None, None)


class TestSequenceParallelism:  # veRL's is in test_verl.py
    @pytest.mark.parametrize("dimension", ["cp_size", "sp_size"])
    def test_accelerate(self, dimension: str, monkeypatch: pytest.MonkeyPatch) -> None:
        state: Any = ModuleType("accelerate.state")
        shared = {"parallelism_config": SimpleNamespace(**{dimension: 4})}
        state.AcceleratorState = SimpleNamespace(_shared_state=shared)
        monkeypatch.setitem(sys.modules, "accelerate.state", state)
        with pytest.raises(NotImplementedError, match="sequence parallelism over 4 ranks"):
            forward()
