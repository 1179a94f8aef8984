"""The rollout by vLLM, in this process: requests join and leave, and prompts come in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from fa3_ops.tools.consistency.model.recording import HEAD, Rollout, Token

SETTINGS = {
    "enforce_eager": True,
    "enable_prefix_caching": False,  # every token of every sequence is to be computed
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 30,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


def roll_out(name: str, dtype: str, prompts: list[list[int]], new_tokens: int) -> Rollout:
    longest = max(map(len, prompts)) + new_tokens
    llm = LLM(name, dtype=dtype, max_model_len=longest, **SETTINGS)
    rollout = Rollout(f"vLLM {vllm.__version__}")
    try:
        llm.collective_rpc(lambda worker: Listener(worker.model_runner, rollout).listen())
        greedy = SamplingParams(
            temperature=0, max_tokens=new_tokens, logprobs=0, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(requests, greedy, use_tqdm=False)
        for prompt, result in zip(prompts, results, strict=True):
            (output,) = result.outputs
            steps = zip(output.token_ids, output.logprobs, strict=True)
            log_probs = [step[token].logprob for token, step in steps]
            rollout.finish(prompt, list(output.token_ids), log_probs)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return rollout


class Listener:
    """Records what the layers of vLLM's model do, step by step."""

    def __init__(self, runner: Any, rollout: Rollout) -> None:
        self.runner = runner
        self.rollout = rollout
        self.tokens: list[Token] = []  # of this step
        self.last: list[Token] = []  # of each request, which logits are made of

    def listen(self) -> None:
        model = self.runner.model
        packed = getattr(model, "packed_modules_mapping", {})
        model.register_forward_pre_hook(self.begin_step, with_kwargs=True)
        for name, module in model.named_modules():
            parent, _, own = name.rpartition(".")
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(self.logits)
            elif isinstance(module, Attention):
                module.register_forward_hook(self.attention(parent))
            elif own in packed and hasattr(module, "output_sizes"):
                parts = [f"{parent}.{part}" for part in packed[own]]
                module.register_forward_hook(self.fused(parts, module.output_sizes))
            elif next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(self.layer(name), with_kwargs=True)

    def begin_step(self, model: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        """Rows are sorted by requests, which vLLM names after their number."""
        requests = [int(name.split("-")[0]) for name in self.runner.input_batch.req_ids]
        starts = self.runner.query_start_loc.np[: len(requests) + 1].tolist()
        positions = named["positions"].tolist()
        self.tokens = [
            (request, position)
            for request, begin, end in zip(requests, starts[:-1], starts[1:], strict=True)
            for position in positions[begin:end]
        ]
        self.last = [self.tokens[end - 1] for end in starts[1:]]

    def layer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            taken = (*inputs, *named.values())[0]
            given, *more = output if isinstance(output, tuple) else (output,)
            if more and more[0] is not None and more[0].shape == given.shape:
                taken = more[0]  # a norm that added the residual first
            self.rollout.layers[name].record(self.tokens, taken, given)

        return hook

    def fused(self, names: list[str], sizes: list[int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            for name, part in zip(names, given.split(sizes, -1), strict=True):
                self.rollout.layers[name].record(self.tokens, inputs[0], part)

        return hook

    def attention(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            query, key = (x.reshape(len(self.tokens), -1) for x in inputs[:2])
            self.rollout.layers[name].record(self.tokens, torch.cat((query, key), -1), output)

        return hook

    def logits(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.rollout.layers[HEAD].record(self.last, inputs[1], output)
