"""The CPU kernels' primitives on every instruction set of this machine, and on an emulated Arm."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import fa3_ops  # noqa: F401

ROOT = Path(__file__).parent.parent
CAPABILITIES = torch.ops.fa3npu.cpu_capabilities().split(", ")
CXX = shlex.split(os.environ.get("CXX", "g++"))
ARM_CXX, ARM = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = [
    *(*runpy.run_path(str(ROOT / "setup.py"))["FLAGS"], "-O2", f"-I{ROOT / 'csrc'}"),
    *(f"-isystem{path}" for path in include_paths()),
]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def program(name: str, folder: Path, capability: str, *compiler: str) -> str:
    """Compiles a test of an instruction set as the kernels are compiled."""
    sources = (ROOT / f"tests/cpp/{name}.cpp", ROOT / "csrc/cpu/tile/baseline.cpp")
    made = str(folder / name)
    run(*compiler, *FLAGS, f"-DFA3NPU_FOR_{capability}", *map(str, sources), "-o", made)
    return made


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_primitives(capability: str, tmp_path: Path) -> None:
    printed = run(program("primitives", tmp_path, capability, *CXX)).splitlines()
    assert (printed[0], printed[-1]) == (capability, "0 failures")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_scratch_has_an_end(capability: str, tmp_path: Path) -> None:
    printed = run(program("scratch", tmp_path, capability, *CXX, "-O1")).splitlines()
    assert printed == [capability, "0 failures"]


def test_every_header_stands_alone(tmp_path: Path) -> None:
    """Each header includes what it uses, and itself once."""
    headers = [*(ROOT / "csrc").glob("**/*.h")]
    assert len(headers) > 10

    def compile_one(header: Path) -> None:
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f'#include "{header}"\n' * 2)
        run(*CXX, *FLAGS, "-Werror", "-fsyntax-only", str(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert len([*pool.map(compile_one, headers)]) == len(headers)


@pytest.mark.skipif(
    "FA3NPU_TEST_ARM" not in os.environ and not (shutil.which(ARM_CXX) and shutil.which(ARM)),
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user; `make test-arm` insists",
)
class TestArm:
    def test_primitives(self, tmp_path: Path) -> None:
        made = program("primitives", tmp_path, "NEON", ARM_CXX, "-static")
        printed = run(ARM, made).splitlines()
        assert (printed[0], printed[-1]) == ("NEON", "0 failures")

    def test_everything_compiles(self, tmp_path: Path) -> None:
        """All of csrc, with PyTorch's headers and without Python's."""
        sources = [*(ROOT / "csrc").glob("**/*.cpp")]
        assert len(sources) > 10
        library = tmp_path / "library.h"  # precompiled: it takes longer than all of csrc
        library.write_text("#include <torch/csrc/stable/library.h>\n")
        run(ARM_CXX, *FLAGS, "-x", "c++-header", str(library), "-o", f"{library}.gch")

        def compile_one(source: Path) -> str:
            vectors = source.stem == "portable"  # what must be inlined, only code tells
            code = ("-c", "-o", str(tmp_path / "code.o")) if vectors else ("-fsyntax-only",)
            return run(ARM_CXX, *FLAGS, "-include", str(library), *code, str(source))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            assert len([*pool.map(compile_one, sources)]) == len(sources)
