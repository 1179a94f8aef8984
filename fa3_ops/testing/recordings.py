"""Calls of real FlashAttention kernels, recorded with their results, and the rule by which other
results agree with them. tests/golden/README.md describes the files and gives the rule."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops import reference

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}
SCHEDULES = ("num_splits", "pack_gqa", "max_seqlen_q", "max_seqlen_k")
FLAGS = ("return_softmax_lse", "return_attn_probs")


@dataclass
class FunctionCall:
    """A call of a function of fa3_ops, on CPU, and what a real kernel gave, if it was recorded."""

    name: str
    function_name: str
    arguments: dict[str, Any]
    recorded: dict[str, Tensor] = field(default_factory=dict)
    kind: str = "right"  # or which error the recorded kernel made

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(fa3_ops, self.function_name)
        return function

    def fresh(self, device: str = "cpu") -> dict[str, Any]:
        """Copies on the device, as an append writes into its own; softmax_lse is asked for."""
        flag = FLAGS[self.function_name != "flash_attn_with_kvcache"]
        copies = {
            name: x.clone().to(device) if isinstance(x, Tensor) else x
            for name, x in self.arguments.items()
        }
        return copies | {flag: True}

    def exact(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The float64 results, and the arguments, whose caches an append has written."""
        arguments = {k: x for k, x in self.fresh().items() if k not in SCHEDULES + FLAGS}
        if self.function_name == "flash_attn_with_kvcache":
            return *reference.flash_attn_with_kvcache(**arguments), arguments
        return *reference.batched(**arguments), arguments

    @property
    def lse_is_comparable(self) -> bool:
        """FlashAttention-2's softmax_lse of ALiBi under causal has another constant per row."""
        return not self.name.startswith("alibi_causal1")

    def tolerances(self, out: Tensor, softmax_lse: Tensor) -> tuple[float, float]:
        """For these exact results: what rounding costs, or what the recorded kernel itself errs."""
        if not self.recorded:
            rounding = {torch.float32: 2e-4, torch.float16: 6e-3}
            return rounding.get(self.arguments["q"].dtype, 4e-2), 5e-3
        error = largest_error(self.recorded["out"], out)
        lse_error = largest_error(self.recorded["softmax_lse"], softmax_lse)
        return 1.5 * error + 2e-3, 2 * lse_error + 2e-3

    def disagreements(
        self, out: Tensor, softmax_lse: Tensor, arguments: dict[str, Any]
    ) -> list[str]:
        """What is wrong with these results, and with the caches that an append has written."""
        want, want_lse, written = self.exact()
        most, most_lse = self.tolerances(want, want_lse)
        wrong = []
        if self.recorded and out.dtype != self.recorded["out"].dtype:
            wrong.append(f"out has dtype {out.dtype} instead of {self.recorded['out'].dtype}")
        if (found := largest_error(out, want)) > most:
            wrong.append(f"out errs by {found:.1e}, tolerated {most:.1e}")
        if self.lse_is_comparable and (found := largest_error(softmax_lse, want_lse)) > most_lse:
            wrong.append(f"softmax_lse errs by {found:.1e}, tolerated {most_lse:.1e}")
        if "k" not in arguments or "k_cache" not in arguments:
            return wrong
        for name in ("k_cache", "v_cache"):
            rotated = name == "k_cache" and "rotary_cos" in arguments
            cache = self.recorded.get(f"{name}_after", written[name])
            if (found := largest_error(arguments[name], cache)) > (0.04 if rotated else 0):
                wrong.append(f"{name} differs by {found:.1e} after the append")
        return wrong


def largest_error(got: Tensor, want: Tensor) -> float:
    """Infinite where one side is infinite or NaN and the other is not."""
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    got, want = got.cpu().double(), want.double()
    agree = (got == want) | (got.isinf() & want.isinf())
    if got.numel() == 0:
        return 0.0
    distance = (got - want).abs().masked_fill(agree, 0.0)
    return float(distance.nan_to_num(float("inf"), float("inf")).max())


def read_safetensors(path: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The recorded cases and tensors of a file. The format is short enough to need no package."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    cases = json.loads(header.pop("__metadata__")["cases"])
    tensors = {}
    for name, entry in header.items():
        dtype, shape = SAFETENSORS[entry["dtype"]], entry["shape"]
        begin = 8 + length + entry["data_offsets"][0]
        if prod(shape) == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=prod(shape), offset=begin)
            tensors[name] = tensors[name].reshape(shape)
    return cases, tensors


def recorded_calls(path: Path) -> Iterator[FunctionCall]:
    """The calls of a file, those with the errors of real kernels, too."""
    cases, tensors = read_safetensors(path)
    for case in cases:
        name = case["name"]
        arguments = {key: tensors[f"{name}/in/{key}"] for key in case["inputs"]}
        arguments |= {key: x for key, x in case["scalars"].items() if key not in FLAGS}
        recorded = {key: tensors[f"{name}/out/{key}"] for key in case["outputs"]}
        yield FunctionCall(name, case["fn"], arguments, recorded, case.get("kind", "right"))
