"""The recorded calls of the real FlashAttention kernels; see golden/README.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass
class Case:
    name: str
    fn: str
    scalars: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """Fresh keyword arguments: an append writes into its copy."""
        return {name: t.clone() for name, t in self.inputs.items()} | self.scalars


def load_cases() -> list[Case]:
    cases = []
    for path in (FOLDER / "fa3.safetensors", FOLDER / "fa2_alibi.safetensors"):
        with safe_open(path, "pt") as file:
            for case in json.loads(file.metadata()["cases"]):
                name = case["name"]
                cases.append(
                    Case(
                        name,
                        case["fn"],
                        case["scalars"],
                        {key: file.get_tensor(f"{name}/in/{key}") for key in case["inputs"]},
                        {key: file.get_tensor(f"{name}/out/{key}") for key in case["outputs"]},
                    )
                )
    return cases
