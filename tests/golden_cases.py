"""The recorded calls of the real FlashAttention kernels; see golden/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fa3_ops import reference

FOLDER = Path(__file__).parent / "golden"
SCHEDULES = ("num_splits", "pack_gqa", "max_seqlen_q", "max_seqlen_k")


@dataclass
class Case:
    name: str
    fn: str
    scalars: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    kind: str = "right"  # or which error a recorded kernel made

    @property
    def wants_lse(self) -> dict[str, bool]:
        """The keyword argument that makes the function return softmax_lse too."""
        kvcache = self.fn == "flash_attn_with_kvcache"
        return {"return_softmax_lse" if kvcache else "return_attn_probs": True}

    def arguments(self) -> dict[str, Any]:
        """Fresh keyword arguments: an append writes into its copy."""
        return {name: t.clone() for name, t in self.inputs.items()} | self.scalars


def load(path: Path) -> list[Case]:
    with safe_open(path, "pt") as file:
        return [
            Case(
                case["name"],
                case["fn"],
                case["scalars"],
                {key: file.get_tensor(f"{case['name']}/in/{key}") for key in case["inputs"]},
                {key: file.get_tensor(f"{case['name']}/out/{key}") for key in case["outputs"]},
                case.get("kind", "right"),
            )
            for case in json.loads(file.metadata()["cases"])
        ]


def load_cases() -> list[Case]:
    """FlashAttention-3 and -2 on an H100."""
    return load(FOLDER / "fa3.safetensors") + load(FOLDER / "fa2_alibi.safetensors")


def exact(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The float64 result and the arguments, whose caches the append has written."""
    arguments = {k: v for k, v in case.arguments().items() if k not in SCHEDULES}
    if case.fn == "flash_attn_with_kvcache":
        return *reference.flash_attn_with_kvcache(**arguments), arguments
    return *reference.batched(**arguments), arguments


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference; infinities must agree, then they differ by 0."""
    got = got.double()
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want).nan_to_num(0.0).abs().max())


def check(case: Case, out: Tensor, softmax_lse: Tensor, arguments: dict[str, Any]) -> None:
    """Results and appended caches against a recorded kernel's, by the rule of golden/README.md."""
    want, want_lse, _ = exact(case)
    assert out.dtype == case.outputs["out"].dtype
    assert error(out, want) <= 1.5 * error(case.outputs["out"], want) + 2e-3
    if not case.name.startswith("alibi_causal1"):  # FA2's LSE has another constant per row there
        recorded = case.outputs["softmax_lse"]
        assert softmax_lse.shape == recorded.shape
        assert error(softmax_lse, want_lse) <= 2 * error(recorded, want_lse) + 2e-3
    if "k_cache_after" in case.outputs:
        assert torch.equal(arguments["v_cache"], case.outputs["v_cache_after"])
        tolerance = 0.04 if "rotary_cos" in case.inputs else 0.0
        torch.testing.assert_close(
            arguments["k_cache"], case.outputs["k_cache_after"], rtol=0, atol=tolerance
        )
