"""RL on a small Qwen3 of transformers: do trainer and rollout give a token the same probability?

    python examples/rl_consistency.py
    python examples/rl_consistency.py --device cuda
    python examples/rl_consistency.py --device npu      # bfloat16, a few iterations

The model first learns to write text. Then, once with fa3_ops and once with PyTorch's attention and
linear layers, it is rewarded for vowels: every iteration draws texts by continuous batching through
a paged KV cache (rollout.py), computes their log-probabilities again in packed batches, as a
trainer does, and takes one step of policy gradient. The metrics are veRL's, by its names.
The exit status is 0 if no log-probability of fa3_ops differs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch is imported: OpenMP threads that spin for long starve others on shared cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F
from documents import load_documents, pieces_of, show_progress
from rollout import Engine, Request, token_log_probs
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import fa3_ops.batch_invariant
import fa3_ops.integrations.transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUP = 8  # texts of one prompt, whose rewards are compared
MICRO_BATCH = 16  # texts of one forward and backward pass of the trainer


class Stack(NamedTuple):
    name: str
    rollout: str  # attention functions, by the names that transformers knows them by
    trainer: str
    layers: Callable[[], AbstractContextManager[Any]]


STACKS = (
    Stack("fa3_ops", "paged_fa3npu", "fa3npu", fa3_ops.batch_invariant.BatchInvariantMode),
    Stack("SDPA", "paged_sdpa", "sdpa", nullcontext),
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="file to learn from (default: Python's manual)")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable")
    parser.add_argument("--steps", type=int, help="of learning to write (default: 300, on npu 10)")
    parser.add_argument("--iterations", type=int, help="of RL (default: 21, on npu 3)")
    parser.add_argument("--prompts", type=int, help=f"of {GROUP} texts each (default: 6, on npu 2)")
    parser.add_argument("--picture", type=Path, help="PNG to draw the result into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    few = args.device == "npu"  # which is emulated, or may be
    args.dtype = args.dtype or (["bfloat16"] if few else list(DTYPES))
    args.steps = args.steps or (10 if few else 300)
    args.iterations = args.iterations or (3 if few else 21)
    args.prompts = args.prompts or (2 if few else 6)
    return args


# ---- The trainer -------------------------------------------------------------------------------


class Trainer:
    """A policy of any dtype, and its float32 weights, which the optimiser changes."""

    def __init__(self, weights: PreTrainedModel, dtype: torch.dtype, learning_rate: float) -> None:
        self.weights = from_config(weights.config, torch.float32, weights.device)
        self.weights.load_state_dict(weights.state_dict())
        self.policy = from_config(weights.config, dtype, weights.device)
        self.policy.load_state_dict(weights.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.weights.parameters(), lr=learning_rate, betas=(0.9, 0.95)
        )

    def step(self) -> None:
        """Takes a step by the policy's gradients, and gives the policy the new weights."""
        pairs = list(zip(self.weights.parameters(), self.policy.parameters(), strict=True))
        for weight, computed in pairs:
            weight.grad, computed.grad = computed.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for weight, computed in pairs:
                computed.copy_(weight)


def from_config(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device)


def positions_of(lengths: Sequence[int]) -> Tensor:
    """Of packed sequences: transformers sees by them where one begins."""
    return torch.cat([torch.arange(length) for length in lengths])


def learn_to_write(documents: Sequence[Tensor], args: argparse.Namespace) -> PreTrainedModel:
    """A small Qwen3 of bytes, float32, that has seen `args.steps` packed batches."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    device = torch.device(args.device)
    trainer = Trainer(from_config(config, torch.float32, device), DTYPES[args.dtype[0]], 1.5e-3)
    trainer.policy.set_attn_implementation("fa3npu")
    rng = random.Random(args.seed)
    smooth, start = 0.0, time.perf_counter()
    for step in range(1, args.steps + 1):
        pieces = pieces_of(documents, 512, 128, rng)
        inputs = torch.cat([piece[:-1] for piece in pieces]).to(device)
        targets = torch.cat([piece[1:] for piece in pieces]).to(device)
        positions = positions_of([len(piece) - 1 for piece in pieces]).to(device)
        logits = trainer.policy(inputs[None], position_ids=positions[None], use_cache=False).logits
        loss = F.cross_entropy(logits[0].float(), targets)
        loss.backward()
        trainer.step()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        rate = step * 512 / (time.perf_counter() - start)
        text = f"writing: step {step}/{args.steps}  loss {smooth:.3f}  {rate:,.0f} tokens/s"
        show_progress(step, args.steps, text)
    return trainer.weights


def packed_log_probs(policy: PreTrainedModel, requests: Sequence[Request]) -> Tensor:
    """Of all generated tokens, in one packed forward pass; differentiable."""
    lengths = [len(request.all_tokens) for request in requests]
    tokens = torch.tensor([t for request in requests for t in request.all_tokens])
    positions = positions_of(lengths)
    generated = torch.cat(
        [torch.arange(n) >= len(r.prompt) for n, r in zip(lengths, requests, strict=True)]
    ).nonzero()[:, 0]
    device = policy.device
    logits = policy(
        input_ids=tokens[None].to(device),
        position_ids=positions[None].to(device),
        use_cache=False,
        logits_to_keep=(generated - 1).to(device),
    ).logits[0]
    return token_log_probs(logits, tokens[generated].to(device))


# ---- Reinforcement -----------------------------------------------------------------------------


@dataclass
class Run:
    stack: Stack
    dtype: str
    rewards: list[float] = field(default_factory=list)  # mean of each iteration
    metrics: list[dict[str, float]] = field(default_factory=list)  # of each iteration
    sequences: int = 0
    seconds: float = 0

    @property
    def name(self) -> str:
        return f"{self.stack.name} {self.dtype}"


def reward(request: Request) -> float:
    """The share of vowels."""
    return sum(token in b"aeiouAEIOU" for token in request.tokens) / len(request.tokens)


def advantages(rewards: Tensor) -> Tensor:
    """How much better a text is than the others of its prompt, in standard deviations (GRPO)."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def compare(rollout: Tensor, actor: Tensor) -> dict[str, float]:
    """veRL's metrics, by its names and formulas, of the log-probabilities of all tokens."""
    ratio = (actor - rollout).double()
    probs = torch.stack([actor.exp(), rollout.exp()]).double()
    difference = (probs[0] - probs[1]).abs()
    return {
        "tokens": len(ratio),
        "log-probs that differ": int((ratio != 0).sum()),
        "largest difference of log-probs": ratio.abs().max().item(),
        "training/rollout_probs_diff_max": difference.max().item(),
        "training/rollout_probs_diff_mean": difference.mean().item(),
        "training/rollout_probs_diff_std": difference.std().item(),
        "training/rollout_actor_probs_pearson_corr": torch.corrcoef(probs)[0, 1].item(),
        "rollout_corr/kl": 0 - ratio.mean().item(),
        "rollout_corr/k3_kl": (ratio.exp() - ratio - 1).mean().item(),
    }


def draw_requests(documents: Sequence[Tensor], n: int, rng: random.Random) -> list[Request]:
    """Pieces of documents as prompts, each for GROUP texts of different lengths."""
    requests = []
    for _ in range(n):
        document = rng.choice(documents)
        begin = rng.randrange(len(document) - 32)
        prompt = document[begin : begin + rng.randint(4, 32)].tolist()
        requests += [Request(prompt, rng.randint(12, 24)) for _ in range(GROUP)]
    return requests


def reinforce(
    weights: PreTrainedModel,
    stack: Stack,
    dtype: str,
    documents: Sequence[Tensor],
    args: argparse.Namespace,
) -> Run:
    torch.manual_seed(args.seed)
    run, rng = Run(stack, dtype), random.Random(args.seed)
    trainer = Trainer(weights, DTYPES[dtype], learning_rate=3e-4)
    start = time.perf_counter()
    for iteration in range(1, args.iterations + 1):
        requests = draw_requests(documents, args.prompts, rng)
        with stack.layers():
            Engine(trainer.policy, attention=stack.rollout).generate(requests)
            trainer.policy.set_attn_implementation(stack.trainer)
            rewards = torch.tensor([reward(request) for request in requests])
            metrics = compare(*learn(trainer, requests, advantages(rewards)))
        run.metrics.append(metrics)
        run.rewards.append(rewards.mean().item())
        run.sequences += len(requests)
        run.seconds = time.perf_counter() - start
        text = (
            f"{run.name}: iteration {iteration}/{args.iterations}  vowels {run.rewards[-1]:.2f}  "
            f"log-probs that differ: {metrics['log-probs that differ']} of {metrics['tokens']}"
        )
        show_progress(iteration, args.iterations, text)
    return run


def learn(
    trainer: Trainer, requests: Sequence[Request], advantage: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of policy gradient. Returns the rollout's and the trainer's log-probabilities."""
    total = sum(len(request.tokens) for request in requests)
    rollout, actor = [], []
    for begin in range(0, len(requests), MICRO_BATCH):
        batch = requests[begin : begin + MICRO_BATCH]
        log_probs = packed_log_probs(trainer.policy, batch)
        drawn = torch.tensor([p for request in batch for p in request.log_probs])
        lengths = torch.tensor([len(request.tokens) for request in batch])
        weight = advantage[begin : begin + MICRO_BATCH].repeat_interleave(lengths)
        ratio = (log_probs - drawn.to(log_probs.device)).exp()  # exactly 1, or off-policy
        (-(weight.to(ratio.device) * ratio).sum() / total).backward()
        rollout.append(drawn)
        actor.append(log_probs.detach().cpu())
    trainer.step()
    return torch.cat(rollout), torch.cat(actor)


# ---- What is shown -----------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """The worst iteration's metrics of every run."""
    rows = [["", *(run.name for run in runs)]]
    for name in list(runs[0].metrics[0])[1:]:
        cells = []
        for run in runs:
            values = [metrics[name] for metrics in run.metrics]
            if name == "log-probs that differ":
                tokens = sum(metrics["tokens"] for metrics in run.metrics)
                cells.append(f"{sum(values):,} of {tokens:,}")
            elif name.endswith("pearson_corr"):
                cells.append(f"{min(values):.8f}")
            else:
                cells.append(f"{max(values, key=abs):.2g}")
        rows.append([name, *cells])
    rows.append(["sequences", *(f"{run.sequences:,}" for run in runs)])
    rows.append(["vowels", *(f"{run.rewards[0]:.2f} to {run.rewards[-1]:.2f}" for run in runs)])
    rows.append(["seconds", *(f"{run.seconds:.0f}" for run in runs)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for run in runs:
        iterations = range(1, len(run.rewards) + 1)
        style = {
            "color": "tab:blue" if run.stack is STACKS[0] else "tab:red",
            "linestyle": "-" if run.dtype == "bfloat16" else "--",
            "label": run.name,
        }
        differences = [metrics["largest difference of log-probs"] for metrics in run.metrics]
        above.plot(iterations, differences, marker=".", **style)
        below.plot(iterations, run.rewards, **style)
    above.set_yscale("symlog", linthresh=1e-8)
    above.set_ylim(bottom=-2e-9)
    above.set_title("Trainer and rollout: largest difference of a token's log-probability")
    above.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 0.1))
    below.set_title("Reward: share of vowels")
    below.set_xlabel("iteration")
    below.xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    start = time.perf_counter()
    args = arguments(argv)
    if args.device == "npu":
        import torch_npu  # noqa: F401
    torch.manual_seed(args.seed)
    fa3_ops.integrations.transformers.register()
    name, documents = load_documents(args.text)
    documents = [document for document in documents if len(document) > 256]
    if not documents:
        raise SystemExit(f"{name} is too short to learn from")
    weights = learn_to_write(documents, args)
    print(
        f"\ndevice    {args.device}, {torch.get_num_threads()} threads\n"
        f"model     Qwen3, {sum(p.numel() for p in weights.parameters()) / 1e6:.1f} M parameters, "
        f"which has learnt to write {name}\n"
        f"RL        {args.iterations} iterations of {args.prompts * GROUP} texts\n"
    )
    runs = [
        reinforce(weights, stack, dtype, documents, args)
        for dtype in args.dtype
        for stack in STACKS
    ]
    print(f"\nOf the worst iteration:\n\n{table(runs)}\n")
    if args.picture is not None:
        draw(runs, args.picture)
        print(f"picture: {args.picture}")
    print(f"total: {time.perf_counter() - start:.0f} s")
    ours = [m for run in runs if run.stack is STACKS[0] for m in run.metrics]
    return 0 if all(m["log-probs that differ"] == 0 for m in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
