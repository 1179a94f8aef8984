"""Tiny models with random weights and a tokenizer, made on disk: nothing is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 512
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
WINDOWED = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
# The class of transformers without its ending, and what the model has besides TINY.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        WINDOWED
        | {
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3", WINDOWED | {"query_pre_attn_scalar": 64}),
    # Every expert is chosen: two that are all but equal would make a jump of a last bit.
    "gpt_oss": ("GptOss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 4}),
    # Some 0.5 billion parameters, for the benchmark.
    "half_billion": (
        "Qwen3",
        {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}


def make(name: str, folder: Path) -> Path:
    """The model of that name in folder/name, made if it is not there."""
    path = folder / name
    if path.exists():
        return path
    family, differences = MODELS[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**TINY | differences)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    enliven(model)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def enliven(model: torch.nn.Module) -> None:
    """Weights so large that attention is not the mean of its values, and sinks that weigh."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            elif "sinks" in name:
                parameter.normal_()
            elif model.config.tie_word_embeddings and "post_" in name:
                parameter.fill_(2)  # else it says its last token again: what is most like itself


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of bytes, with some merges learnt from this file, and a template for chats."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokens.train_from_iterator([Path(__file__).read_text()], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    return fast


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(make(arguments.name, arguments.folder))
