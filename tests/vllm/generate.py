"""An engine in a process of its own, for what changes a process: threads, speculation, layers.

python generate.py MODEL_FOLDER ANSWERS_FILE '{"settings": {...}, "prompts": 16, "alone": true}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def in_a_process(
    model: Path, file: Path, threads: int = 1, **wishes: Any
) -> dict[str, list[dict[str, Any]]]:
    """The answers to the prompts in a batch, and if so wished to each alone."""
    subprocess.run(
        [sys.executable, __file__, str(model), str(file), json.dumps(wishes)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        check=True,
    )
    return json.loads(file.read_text())


def one_row_at_a_time() -> None:
    """Linear layers whose rows do not depend on how many there are; vLLM's do on CPU."""
    import vllm.model_executor.layers.utils as layers

    packed = layers.dispatch_cpu_unquantized_gemm

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).split(1)
        ys = [torch.nn.functional.linear(row, weight, bias) for row in rows]
        return torch.cat(ys).view(*x.shape[:-1], -1)

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2 and not layer.weight.is_meta:
            layer.cpu_linear = linear
        else:
            packed(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = dispatch


def main(model: str, file: str, wishes: str) -> None:
    import conftest  # noqa: F401, for the environment
    from engines import answers, engine, prompts

    wished = json.loads(wishes)
    if wished.get("rows"):
        one_row_at_a_time()
    asked = prompts()[: wished.get("prompts")]
    with engine(Path(model), **wished["settings"]) as llm:
        said = {"batch": answers(llm, asked)}
        if wished.get("alone"):
            llm.reset_prefix_cache()
            said["alone"] = [answers(llm, [prompt])[0] for prompt in asked]
        Path(file).write_text(json.dumps(said, default=vars))


if __name__ == "__main__":
    main(*sys.argv[1:])
