"""Calls like earlier ones, on CPU tensors served as CUDA's are.

python repeat_calls.py start  by kernels compiled for an H100 and started by a launcher that
    only looks at its arguments: they must be what the kernel was compiled for
python repeat_calls.py start-unaligned  the same, where the alignment of tensors is forgotten
python repeat_calls.py compute  by Triton's interpreter (TRITON_INTERPRET=1): the results of
    repeated calls must be those of first ones
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
from decode_calls import (
    HEADDIM,
    NHEADS,
    NHEADS_K,
    PAGE,
    Call,
    changed,
    decode,
    kinds,
    misaligned,
    moved,
    rand,
)
from torch import Tensor

import fa3_ops
from fa3_ops.backends import cuda, devices, dispatch, repeated
from fa3_ops.backends.cuda import prefill
from fa3_ops.backends.triton import attention
from fa3_ops.ops import composite

ops = torch.ops.fa3npu


def serve_by_triton() -> None:
    """CPU tensors as CUDA ones."""
    backends = dict(cuda.CUDA.backends)
    device = devices.Device("cpu", key="CPU", repeats=True, backends=backends)
    devices.add(device)
    dispatch.serve_by_python(device)


class Launcher:
    """Checks every start of a kernel against what the kernel was compiled for."""

    starts = 0
    wrong: list[str] = []  # noqa: RUF012

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.signature = source.fn.__name__, list(source.signature.items())
        self.constants = {path[0]: x for path, x in source.constants.items()}
        self.aligned = {path[0] for path, x in source.attrs.items() if x}

    def __call__(self, *args: Any) -> None:
        Launcher.starts += 1
        given = args[9:]
        assert len(given) == len(self.signature), self.name
        for i, (x, (name, kind)) in enumerate(zip(given, self.signature, strict=True)):
            if kind == "constexpr":
                fits = x is self.constants[i] or x == self.constants[i]
            elif kind.startswith("*"):
                fits = isinstance(x, Tensor) and (i not in self.aligned or x.data_ptr() % 16 == 0)
            elif kind.startswith("i"):
                fits = type(x) is int and (i not in self.aligned or x % 16 == 0)
            else:  # float, descriptor
                fits = type(x) is float or kind.startswith("tensordesc")
            if not fits:
                Launcher.wrong.append(f"{self.name}: {name} {kind} {x!r:.60}")


def compile_for_an_h100() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    class Utilities:
        def load_binary(self, *args: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

    class H100:
        launcher_cls, utils = Launcher, Utilities()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None) -> int:
            return 0

    driver.set_active(H100())  # type: ignore[no-untyped-call]
    compiler.max_shared_mem = lambda device: 232448
    attention.has_descriptors = lambda device: True
    attention.processors = prefill.processors = lambda device: 1000
    prefill.is_hopper = lambda device: True


def searches() -> list[str]:
    """The kernels that Triton is asked to find, from now on."""
    from triton.runtime.jit import JITFunction

    found: list[str] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.__name__)
        return run(self, *args, **kwargs)

    JITFunction.run = noted
    return found


def start_decodes() -> None:
    """Every kind of call twice, among others of their shapes."""
    found = searches()
    calls = list(kinds())
    others = [other for call in calls[:3] for other in misaligned(call)]
    calls += [*others, *calls, *others]
    for call in calls:
        fa3_ops.flash_attn_with_kvcache(**call)
        before = len(found)
        fa3_ops.flash_attn_with_kvcache(**call)
        assert len(found) == before, found[before:]


def start_others() -> None:
    q, k = rand(1, 600, NHEADS, HEADDIM), rand(1, 600, NHEADS_K, HEADDIM)
    prefill.processors = lambda device: 1
    for x in (q, moved(q, 1), q, moved(q, 8)):
        fa3_ops.flash_attn_func(x, k, k, causal=True)
    rows = rand(3, NHEADS_K, HEADDIM)
    caches, slots = rand(2, 4, PAGE, NHEADS_K, HEADDIM), torch.arange(3)
    for x in (rows, moved(rows, 1), rows):
        fa3_ops.kvcache_scatter_(x, x, *caches, slots)


def start(unaligned: bool) -> None:
    compile_for_an_h100()
    serve_by_triton()
    start_decodes()
    if not unaligned:
        start_others()
    print(Launcher.starts, "starts")
    for line in sorted(set(Launcher.wrong)):
        print("wrong", line)


def results(call: Call, function: Any) -> list[Tensor]:
    """With the caches that it leaves."""
    call = {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}
    out, softmax_lse = function(**call)
    return [out, softmax_lse, call["k_cache"], call["v_cache"]]


def public(**call: Any) -> Any:
    return fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True)


def compute() -> None:
    serve_by_triton()
    prefill.is_hopper = lambda device: False
    for call in kinds():
        public(**call)
        for again in (changed(call), changed(call)):
            got = [results(again, f) for f in (public, ops.flash_attn_with_kvcache)]
            repeated.forget()
            want = results(again, composite.flash_attn_with_kvcache)
            for some in got:
                assert all(map(torch.equal, some, want)), list(call)
            public(**call)
    print("equal")
    call = decode(1, rotary=True)
    public(**call)
    alive = [weakref.ref(x) for x in call.values() if isinstance(x, Tensor)]
    del call
    gc.collect()
    print(sum(ref() is not None for ref in alive), "tensors kept")


if __name__ == "__main__":
    torch.manual_seed(0)
    unaligned = sys.argv[1] == "start-unaligned"
    if unaligned:
        repeated.BYTES = 1
    with torch.no_grad():
        compute() if sys.argv[1] == "compute" else start(unaligned)
