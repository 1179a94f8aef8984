"""vLLM's server on its own attention kernel and on ours, measured by vLLM's own `bench serve`:

    .venv-vllm/bin/python benchmarks/vllm_serve.py [--model qwen3] [--rounds 5] [--concurrency 8]

Random weights and random prompts. Both servers run, one of them at a time has requests, in turn.
Prints the median over the rounds of each figure, and ours over theirs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import tabulate
from vllm.benchmarks import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from servers import server
from tiny_models import MODELS, make

BACKENDS = {"vLLM's kernel": "CPU_ATTN", "fa3_ops": "CUSTOM"}
FIGURES = {
    "request throughput (1/s)": "request_throughput",
    "output token throughput (1/s)": "output_throughput",
    "total token throughput (1/s)": "total_token_throughput",
    "TTFT median (ms)": "median_ttft_ms",
    "TTFT P99 (ms)": "p99_ttft_ms",
    "TPOT median (ms)": "median_tpot_ms",
    "TPOT P99 (ms)": "p99_tpot_ms",
    "ITL median (ms)": "median_itl_ms",
    "ITL P99 (ms)": "p99_itl_ms",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    return parser.parse_args()


def measure(url: str, model: Path, wishes: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What `vllm bench serve` says of one round; its own report goes to stderr."""
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    options = {
        "base-url": url,
        "model": "tiny",
        "tokenizer": str(model),
        "dataset-name": "random",
        "random-input-len": wishes.input_len,
        "random-output-len": wishes.output_len,
        "num-prompts": wishes.requests,
        "max-concurrency": wishes.concurrency,
        "num-warmups": 2,
        "percentile-metrics": "ttft,tpot,itl",
        "metric-percentiles": "99",
        "seed": seed,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with redirect_stdout(sys.stderr):
        return serve.main(parser.parse_args([*arguments, "--ignore-eos", "--disable-tqdm"]))


def main() -> None:
    wishes = parse()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make(wishes.model, folder)
        urls = {}
        for name, backend in BACKENDS.items():
            options = ("--attention-backend", backend, "--dtype", wishes.dtype)
            length = ("--max-model-len", str(wishes.input_len + wishes.output_len + 64))
            client = stack.enter_context(server(model, folder / backend, *options, *length))
            urls[name] = str(client.base_url).removesuffix("/v1/")
        rounds = [
            {name: measure(url, model, wishes, seed) for name, url in urls.items()}
            for seed in range(wishes.rounds)
        ]
    rows = []
    for figure, key in FIGURES.items():
        theirs, ours = (statistics.median(r[name][key] for r in rounds) for name in BACKENDS)
        rows.append([figure, theirs, ours, ours / theirs])
    print(
        f"{wishes.model}, {wishes.dtype}: {wishes.requests} requests of {wishes.input_len} + "
        f"{wishes.output_len} tokens, {wishes.concurrency} at once, {wishes.rounds} rounds\n"
    )
    headers = ["figure", *BACKENDS, "ratio"]
    print(tabulate.tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
