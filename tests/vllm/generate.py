"""An engine in a process of its own, for what changes a process: threads, speculation, the
environment.

python generate.py MODEL_FOLDER ANSWERS_FILE '{"settings": {...}, "prompts": 16, "alone": true}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def in_a_process(
    model: Path, file: Path, threads: int = 1, batch_invariant: bool = False, **wishes: Any
) -> dict[str, list[dict[str, Any]]]:
    """The answers to the prompts in a batch, and if so wished to each alone."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_BATCH_INVARIANT": str(int(batch_invariant)),
    }
    subprocess.run(
        [sys.executable, __file__, str(model), str(file), json.dumps(wishes)],
        env=os.environ | environment,
        check=True,
    )
    return json.loads(file.read_text())


def load_again(model: torch.nn.Module, weights: Path) -> None:
    """As a trainer does after each of its steps."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_weights(load_file(weights).items())


def main(model: str, file: str, wishes: str) -> None:
    import conftest  # noqa: F401, for the environment
    from engines import answers, engine, prompts

    wished = json.loads(wishes)
    asked = prompts()[: wished.get("prompts")]
    with engine(Path(model), **wished["settings"]) as llm:
        said = {"batch": answers(llm, asked)}
        if wished.get("reload"):
            llm.apply_model(partial(load_again, weights=Path(model, "model.safetensors")))
        if wished.get("alone"):
            llm.reset_prefix_cache()
            said["alone"] = [answers(llm, [prompt])[0] for prompt in asked]
        Path(file).write_text(json.dumps(said, default=vars))


if __name__ == "__main__":
    main(*sys.argv[1:])
