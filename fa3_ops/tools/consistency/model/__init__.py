"""Where the log-probabilities of a model part: those of its rollout and those of its trainer.

`python -m fa3_ops consistency --model` runs a rollout, records what each of its layers takes and
gives, and lets transformers compute the same tokens in one forward pass over packed sequences, as a
trainer does: once with every layer on what the rollout's layer took, so that a difference is that
layer's own, and once as it is, for the log-probabilities.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a model's rollout beside its trainer, on CPU")
    group.add_argument("--model", metavar="PATH_OR_NAME", help="a causal model of transformers")
    group.add_argument(
        "--rollout",
        choices=("vllm", "transformers"),
        help="vLLM, where it is installed; else transformers, decoding through its cache",
    )
    group.add_argument(
        "--stock", action="store_true", help="for comparison: both sides without fa3_ops"
    )
    group.add_argument("--sequences", type=int, default=16)
    group.add_argument("--new-tokens", type=int, default=16, help="of each sequence")


def main(arguments: argparse.Namespace) -> int:
    """Prints a table for each dtype, bfloat16 if none is given; 1 if log-probabilities differ."""
    if arguments.device not in (None, "cpu"):
        print(f"--model runs on cpu, got --device {arguments.device}")
        return 1
    if find_spec("transformers") is None:
        print("--model needs transformers 5, which is not installed")
        return 1
    from fa3_ops.tools.consistency.model.compare import compare

    rollout = arguments.rollout or ("vllm" if find_spec("vllm") else "transformers")
    differ = [compare(arguments, rollout, dtype) for dtype in arguments.dtype or ["bfloat16"]]
    return int(any(differ))
