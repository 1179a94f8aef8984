"""Tiny models with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 199
WINDOW = 8
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# The configuration's class and the model's, without their endings, and what goes into the first.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", DECODER),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", DECODER),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", DECODER | EXPERTS),
    "mistral": ("Mistral", "MistralForCausalLM", DECODER | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        DECODER | WINDOWED | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 20.0},
    ),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", DECODER | WINDOWED),
    "gpt_oss": (
        "GptOss",
        "GptOssForCausalLM",
        DECODER | WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 4},
    ),
}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": (
        "Bert",
        "BertModel",
        ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "modernbert": (
        "ModernBert",
        "ModernBertModel",
        ENCODER
        | {"local_attention": WINDOW, "global_attn_every_n_layers": 2, "attention_dropout": 0.0}
        | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
VISION_TOKENS = {"image": 190, "video": 191, "start": 192, "end": 193}
QWEN3_VL: dict[str, Any] = {
    "text_config": DECODER
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": VISION_TOKENS["image"],
    "video_token_id": VISION_TOKENS["video"],
    "vision_start_token_id": VISION_TOKENS["start"],
    "vision_end_token_id": VISION_TOKENS["end"],
}
GEMMA3: dict[str, Any] = {
    "text_config": DECODER | WINDOWED,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4,
    "image_token_id": VISION_TOKENS["image"],
}
MODELS = DECODERS | ENCODERS | {"bart": ("Bart", "BartForConditionalGeneration", BART)}


def make(name: str, implementation: str = "fa3npu", **differences: Any) -> Any:
    """The model of that name, the same weights every time, in evaluation mode."""
    config_name, model_name, settings = MODELS[name]
    config = getattr(transformers, f"{config_name}Config")(**settings | differences)
    return build(getattr(transformers, model_name), config, implementation)


def build(model_class: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation)
    enliven(model)
    return model.float().eval()


def enliven(model: torch.nn.Module) -> None:
    """Weights so large that attention is not the mean of its values, and sinks that weigh."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "sinks" in name:
                parameter.normal_()


def tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)


def qwen3_vl(implementation: str) -> Any:
    config = transformers.Qwen3VLConfig(**QWEN3_VL)
    return build(transformers.Qwen3VLForConditionalGeneration, config, implementation)


def with_images(count: int) -> dict[str, torch.Tensor]:
    """Sequences with an image each, of 32 and of 16 patches, four of which are a token."""
    ids = tokens(2, 20).clamp(max=min(VISION_TOKENS.values()) - 1)
    ids[:, 3] = VISION_TOKENS["start"]
    ids[0, 4:12] = ids[1, 4:8] = VISION_TOKENS["image"]
    ids = ids[:count]
    sizes = torch.tensor([[1, 4, 8], [1, 4, 4]])[:count]
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == VISION_TOKENS["image"]).int(),
        "image_grid_thw": sizes,
        "pixel_values": torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator),
    }
