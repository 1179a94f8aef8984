"""`python -m fa3_ops consistency --model`, whose rollout is transformers' own decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fa3_ops import __main__

ARGUMENTS = ("--rollout", "transformers", "--sequences", "4", "--new-tokens", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_models.make("qwen3").save_pretrained(path)
    return str(path)


def run(model: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str]]:
    """The status, and what each row of the table says differs."""
    status = __main__.main(["consistency", "--model", model, *ARGUMENTS, *more])
    printed = capsys.readouterr().out
    lines = [line.split("|") for line in printed.splitlines() if " of " in line and "|" in line]
    rows = {cells[1].strip(): cells[2].strip() for cells in lines}
    (last,) = (line for line in printed.splitlines() if line.startswith("log-probabilities"))
    return status, rows | {"log-probabilities": last.split(": ")[1]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_equals_inference(
    model: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = run(model, capsys, "--dtype", dtype)
    assert status == 0
    assert len(rows) == 21
    assert rows["log-probabilities"] == "0 of 12 differ"
    assert {share.split()[0] for share in rows.values()} == {"0"}


def test_the_layer_that_differs_is_named(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that depends on the number of rows: it alone differs, and the log-probabilities."""
    norm = Qwen3RMSNorm.forward

    def depends(self: Qwen3RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(self, x) + (2**-10 if x.shape[-1] == 64 and x.shape[1] == 1 else 0)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", depends)
    status, rows = run(model, capsys, "--dtype", "float32")
    assert status == 1
    differ = {what for what, share in rows.items() if not share.startswith("0 of")}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert differ == {
        *(f"model.layers.*.{name}" for name in norms),
        "model.norm",
        "log-probabilities",
    }


def test_a_device_that_it_does_not_run_on(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["consistency", "--model", model, "--device", "npu"]) == 1
    assert capsys.readouterr().out == "--model runs on cpu, got --device npu\n"
