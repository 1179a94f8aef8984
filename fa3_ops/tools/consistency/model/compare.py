"""One model in one dtype: the rollout, the trainer, and the table."""

from __future__ import annotations

import argparse
import os
import random

import transformers
from tabulate import tabulate

from fa3_ops.tools.consistency.model.recording import Rollout
from fa3_ops.tools.consistency.model.trainer import Trainer
from fa3_ops.tools.consistency.outcome import Difference


def compare(arguments: argparse.Namespace, rollout: str, dtype: str) -> bool:
    """Prints; whether log-probabilities differ."""
    trainer = Trainer(arguments.model, dtype, arguments.stock)
    prompts = random_prompts(arguments.sequences, trainer.vocabulary)
    if rollout == "vllm":
        made = roll_out_by_vllm(arguments, dtype, prompts)
    else:
        made = trainer.roll_out(prompts, arguments.new_tokens)
    rows = [(what, *shown(difference)) for what, difference in trainer.layers(made).items()]
    log_probs = trainer.log_probs(made)
    ours = "without fa3_ops" if arguments.stock else "with fa3_ops"
    print(
        f"{arguments.model}, {dtype}, {ours}: {len(prompts)} sequences, "
        f"{sum(map(len, made.sequences))} tokens; rollout by {made.made_by}, trainer by "
        f"transformers {transformers.__version__}\n"
    )
    head = ("given the rollout's numbers", "differ", "share", "by at most")
    print(tabulate(rows, head, tablefmt="github", disable_numparse=True))
    differ, _, largest = shown(log_probs)
    print(f"\nlog-probabilities: {differ} differ{largest and f', by at most {largest}'}\n")
    return log_probs.differing > 0


def shown(difference: Difference) -> tuple[str, str, str]:
    differ = f"{difference.differing} of {difference.elements}"
    if difference.differing == 0:
        return differ, "", ""
    return differ, f"{difference.differing / difference.elements:.1%}", f"{difference.largest:.1e}"


def roll_out_by_vllm(
    arguments: argparse.Namespace, dtype: str, prompts: list[list[int]]
) -> Rollout:
    """In this process, where vLLM's layers can be listened to; it reads these when imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(not arguments.stock))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from fa3_ops.tools.consistency.model.vllm_rollout import roll_out

    return roll_out(arguments.model, dtype, prompts, arguments.new_tokens)


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Of 1 to 96 tokens."""
    draw = random.Random(0)
    lengths = [1, 96, *(draw.randint(1, 96) for _ in range(count))][:count]
    return [[draw.randrange(vocabulary) for _ in range(n)] for n in lengths]
