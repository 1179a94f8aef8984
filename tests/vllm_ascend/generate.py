"""What an engine says to some prompts, in a process of its own and in the environment it is run in:
vLLM-Ascend's on the emulated NPU, vLLM's on CPU.

python generate.py FILE MODEL MODELS_FOLDER '{"dtype": "float32", ...}'
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401, for the environment
from tiny_models import VOCABULARY, make

NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    """Shorter than a page, as long, and longer than what one step takes, so that they are chunked;
    the last one begins with the first page of the one before."""
    draw = random.Random(11)
    made = [draw.choices(range(3, VOCABULARY), k=n) for n in (4, 31, 65, 128, 130, 300, 200)]
    made[-1][:140] = made[-2][:140]
    return made


def settings_of(**different: Any) -> dict[str, Any]:
    return {
        "max_model_len": 512,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": 128,
        "enforce_eager": True,
        "disable_log_stats": False,  # of speculation
        "logprobs_mode": "raw_logprobs",
        "seed": 0,
    } | different


def main(file: str, model: str, folder: str, different: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(str(make(model, Path(folder))), **settings_of(**json.loads(different)))
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    greedy = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=5, ignore_eos=True, detokenize=False
    )
    said = llm.generate([{"prompt_token_ids": p} for p in prompts()], greedy, use_tqdm=False)
    counted = {x.name: x.value for x in llm.get_metrics() if hasattr(x, "value")}
    found = {
        "attention": sorted({type(x.impl).__name__ for x in layers if hasattr(x, "impl")}),
        "tokens": [list(x.outputs[0].token_ids) for x in said],
        "logprobs": [
            [{str(t): x.logprob for t, x in step.items()} for step in answer.outputs[0].logprobs]
            for answer in said
        ],
        "accepted": counted.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    Path(file).write_text(json.dumps(found))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
