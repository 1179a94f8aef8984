"""A kernel as the front half of Triton-Ascend leaves it: the IR that CANN's compiler takes.

Triton-Ascend compiles in two halves. The first turns a kernel into MLIR of upstream's dialects
(linalg, memref, scf, arith, math) and a few of Ascend's, which it calls ttadapter; it is in the
wheel and needs neither CANN nor a device. The second is CANN's bishengir-compile.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

DEVICE = GPUTarget("npu", "Ascend910B3", 0)
RUNS = 3  # of a program that crashes now and then


class NotLowered(Exception):
    """Triton-Ascend does not take the kernel; the text is its own."""


def lower(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> str:
    """The ttadapter of a kernel for one set of argument types and constants.

    signature has the types of the arguments that are passed ("*fp16", "i32", "fp32"), constants the
    values of the others: what is tl.constexpr, and None for a tensor that is not given.
    """
    given = {*signature, *constants}
    missing, unknown = set(kernel.arg_names) - given, given - set(kernel.arg_names)
    if missing or unknown:
        missing, unknown = ", ".join(sorted(missing)), ", ".join(sorted(unknown))
        raise TypeError(
            f"{kernel.__name__}: neither typed nor constant: {missing}; no argument: {unknown}"
        )
    backend = make_backend(DEVICE)
    options = backend.parse_options({"enable_fp_fusion": False})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    source = ASTSource(kernel, dict(signature), dict(constants))
    key = hashlib.sha256(f"{kernel.__name__}{signature}{constants}".encode()).hexdigest()
    metadata = {"hash": key, "target": DEVICE, **vars(options)}
    try:
        codegen, modules = backend.get_codegen_implementation(), backend.get_module_map()
        module = stages["ttir"](source.make_ir(options, codegen, modules, context), metadata)
        return _unless_it_crashes(lambda: str(stages["ttadapter"](module, metadata)))
    except triton.CompilationError as error:
        raise NotLowered(f"{kernel.__name__}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise NotLowered(f"{kernel.__name__}: {error.stderr.decode()}") from error


def _unless_it_crashes(adapt: Callable[[], str]) -> str:
    """What Triton-Ascend's triton-adapter-opt makes. 3.2.0's died of a segmentation fault in 2 of
    900 runs over the gradient's kernels, which it took in all others (in none of 600 over
    attention's). What it refuses it says, and is not asked again."""
    for _ in range(RUNS - 1):
        try:
            return adapt()
        except subprocess.CalledProcessError as error:
            if error.returncode != -signal.SIGSEGV:
                raise
    return adapt()
