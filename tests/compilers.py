"""Builds the extension with every C++ compiler of this machine and tests each build: `make
test-compilers`. Fails where there are fewer than two."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLDEST = {"g++": 11, "clang++": 16}
NEWEST = 30
TESTS = ("tests/test_primitives.py", "tests/test_cpu_capabilities.py")


def version(command: str) -> int:
    """The major version of a compiler."""
    printed = subprocess.run([command, "-dumpversion"], capture_output=True, text=True, check=True)
    return int(re.match(r"\d+", printed.stdout)[0])


def compilers() -> dict[str, str]:
    """The commands of all that can build the extension, by name and version."""
    found: dict[str, str] = {}
    for name, oldest in OLDEST.items():
        for command in (*(f"{name}-{n}" for n in range(oldest, NEWEST)), name):
            if shutil.which(command) and version(command) >= oldest:
                found.setdefault(f"{name}-{version(command)}", command)
    return found


def run(*command: str, **variables: str) -> str:
    environment = os.environ | variables
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\n{' '.join(command)} failed with {variables}")
    return result.stdout


def main() -> None:
    found = compilers()
    print("compilers:", ", ".join(found) or "none", flush=True)
    if len(found) < 2:
        sys.exit("needs two compilers: g++ 11 or later, clang++ 16 or later")
    bits: dict[str, str] = {}
    for name, command in found.items():
        print(f"==> {name}: building", flush=True)
        folder = f"build/{name}"
        build = ("--build-base", f"{folder}/temp", "--build-lib", f"{folder}/lib")
        run(sys.executable, "setup.py", "--quiet", "build", *build, CXX=command)
        variables = {"PYTHONPATH": f"{folder}/lib", "CXX": command}
        bits[name] = run(sys.executable, "tests/bits.py", **variables)
        print(bits[name], f"==> {name}: testing", sep="", flush=True)
        tested = run(sys.executable, "-m", "pytest", "-q", *TESTS, **variables)
        print(tested.splitlines()[-1], flush=True)
    if len(set(bits.values())) > 1:
        sys.exit("the builds' results have different bits: see above")
    print("all builds' results have the same bits")


if __name__ == "__main__":
    main()
