"""Garbage for every raw operator: `make fuzz MINUTES=5` runs it under the sanitizers.

A call of garbage.py is served or refused by an ordinary exception. A refused one has written
nothing. A served one has written only what its schema says, and gives the same bits for contiguous
copies of its arguments.

The calls run in a process for each instruction set. Every call has a seed of its own, which is
printed if the call fails or its process dies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from garbage import Call, Calls, memory, readable, view_of
from torch import Tensor

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
LONGEST = 60  # seconds of one call
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONWARNINGS": "ignore"}  # thousands are refused


class Fault(Exception):
    """What no operator may do."""


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def snapshot(call: Call) -> dict[int, tuple[Tensor, Tensor]]:
    """The memory of a call by address, as it is and as it was."""
    storages = {place(x): memory(x) for x in call.values() if readable(x)}
    return {address: (now, now.clone()) for address, now in storages.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [x.detach().clone(memory_format=torch.contiguous_format) for x in (a, b)]
    return a.shape == b.shape and torch.equal(*map(memory, bits))


def run(op: Any, call: Call) -> list[Tensor]:
    named = {a.name for a in op._schema.arguments if a.kwarg_only}
    positional = [x for name, x in call.items() if name not in named]
    results = op(*positional, **{name: call[name] for name in named})
    return [results] if isinstance(results, Tensor) else list(results or ())


def is_refusal(error: Exception) -> bool:
    if isinstance(error, AttributeError):  # PyTorch lets None through as a tensor
        return "'NoneType' object" in str(error)
    return isinstance(error, REFUSALS) and "INTERNAL ASSERT" not in str(error)


def check(op: Any, call: Call) -> bool:
    """Whether the call is served; a Fault if it is neither served nor refused as it should be."""
    before = snapshot(call)
    try:
        results = run(op, call)
    except Exception as error:
        if not is_refusal(error):
            raise Fault(f"raised {type(error).__name__}: {error}") from error
        if not all(torch.equal(now, was) for now, was in before.values()):
            raise Fault(f"was refused and has written: {error}") from error
        return False
    gradients(results)
    tensors = [x for x in (*results, *call.values()) if isinstance(x, Tensor)]
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    comparable = all(readable(x) and x.numel() < 2**31 for x in tensors)
    if comparable and not order_shows(op, call, written):
        compare(op, call, written, results, before)
    return True


def order_shows(op: Any, call: Call, written: list[str]) -> bool:
    """Whether what is written first shows in what is written or read later, in the same memory."""
    appends_first = op._opname == "flash_attn_with_kvcache"
    later = [name for name in call if name not in ("k", "v")] if appends_first else written
    places = Counter(place(call[name]) for name in later if readable(call[name]))
    return any(places[place(call[name])] > 1 for name in written)


def gradients(results: list[Tensor]) -> None:
    """Whatever a backward says, it does not crash."""
    roots = [x for x in results if x.requires_grad]
    if roots:
        try:
            torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])
        except REFUSALS:
            return


def compare(
    op: Any,
    call: Call,
    written: list[str],
    results: list[Tensor],
    before: dict[int, tuple[Tensor, Tensor]],
) -> None:
    """What is written with what was there before, and the same call of contiguous copies."""

    def was(x: Tensor) -> Tensor:
        return view_of(before[place(x)][1], x)

    plain = {
        name: was(x).clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
        for name, x in call.items()
    }
    for name in written:
        with contextlib.suppress(RuntimeError):  # elements that share a place: it was only read
            was(call[name]).copy_(call[name].detach())
    if not all(torch.equal(now, then) for now, then in before.values()):
        raise Fault("wrote where the schema says nothing of it")
    if all(x.is_contiguous() for x in call.values() if isinstance(x, Tensor)):
        return
    try:
        wanted = run(op, plain)
    except REFUSALS as error:
        raise Fault(f"was served, but not with contiguous copies: {error}") from error
    pairs = list(zip(results, wanted, strict=True))
    pairs += [(call[name], plain[name]) for name in written]
    if not all(same_bits(a, b) for a, b in pairs):
        raise Fault("gives other bits with contiguous copies")


# ---- Processes ---------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Makes calls from a seed on; the last line printed is what became of them."""
    calls = Calls()
    served: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    end = time.monotonic() + arguments.seconds
    progress = os.open(arguments.progress, os.O_WRONLY)
    for seed in range(arguments.seed, arguments.seed + arguments.calls):
        if time.monotonic() > end:
            break
        os.pwrite(progress, f"{seed:<24}".encode(), 0)
        signal.alarm(LONGEST)  # ends the process
        op, call, done = calls.make(seed)
        try:
            (served if check(op, call) else refused)[str(op)] += 1
        except Fault as fault:
            print(f"{op}({described(call)})\nafter {', '.join(done)}: {fault}", file=sys.stderr)
            sys.exit(1)
    print(json.dumps([served, refused]))


def described(call: Call) -> str:
    def one(x: object) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        values = x.tolist() if readable(x) and x.numel() < 9 else ""
        return f"{x.dtype} {tuple(x.shape)} strides {x.stride()} {x.device} {values}"

    return ",\n    ".join(f"{name}={one(x)}" for name, x in call.items())


def process(capability: str, seed: int, calls: int, seconds: float) -> tuple[Counter[str], ...]:
    """What became of the calls on one instruction set; ends the run if one of them failed."""
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, __file__, "--progress", progress.name, f"--seed={seed}"]
        worker = subprocess.run(
            [*command, f"--calls={calls}", f"--seconds={seconds}"],
            env=os.environ | QUIET | {"FA3NPU_CPU_CAPABILITY": capability},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if worker.returncode:
            last = Path(progress.name).read_text().strip()
            sys.exit(
                f"fuzz: FAILED with exit status {worker.returncode}; to repeat it: "
                f"FA3NPU_CPU_CAPABILITY={capability} make fuzz SEED={last} CALLS=1"
            )
    served, refused = map(Counter, json.loads(worker.stdout.splitlines()[-1]))
    print(f"{capability}: {served.total()} served, {refused.total()} refused", flush=True)
    return served, refused


def main(arguments: argparse.Namespace) -> None:
    every = torch.ops.fa3npu.cpu_capabilities().split(", ")
    capabilities = [x for x in (os.environ.get("FA3NPU_CPU_CAPABILITY"),) if x] or every
    calls, seconds = arguments.calls, 60 * arguments.minutes / len(capabilities)
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"fuzz: seeds from {seed} on, on {', '.join(capabilities)}", flush=True)
    served: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for capability in capabilities:
        share = -(-calls // len(capabilities))
        yes, no = process(capability, seed, share, seconds)
        served, refused, seed = served + yes, refused + no, seed + share
    for op in sorted(served | refused):
        print(f"{op}: {served[op]} served, {refused[op]} refused")
    total = served.total() + refused.total()
    print(f"fuzz: {total} calls, {served.total()} served, {refused.total()} refused, no fault")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2**40, help="for all instruction sets")
    parser.add_argument("--calls", type=int, default=2**40, help="at most, for all of them")
    parser.add_argument("--seed", type=int, help="of the first call")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    given = parser.parse_args()
    (work if given.progress else main)(given)
