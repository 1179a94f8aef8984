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
TESTS = [str(ROOT / "tests" / f"test_{name}.py") for name in ("primitives", "cpu_capabilities")]


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


def run(folder: Path, *command: str, **variables: str) -> str:
    environment = os.environ | variables
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        printed = result.stdout + result.stderr
        sys.exit(f"{printed}\n{' '.join(command)} failed with {variables}")
    return result.stdout


def main() -> None:
    found = compilers()
    print("compilers:", ", ".join(found) or "none", flush=True)
    if len(found) < 2:
        sys.exit("needs two compilers: g++ 11 or later, clang++ 16 or later")
    bits: dict[str, str] = {}
    for name, command in found.items():
        print(f"==> {name}: building", flush=True)
        folder = ROOT / "build" / name
        build = (f"--build-base={folder}/temp", f"--build-lib={folder}/lib")
        run(ROOT, sys.executable, "setup.py", "--quiet", "build", *build, CXX=command)
        # Not in ROOT, from where Python would import the package that lies there.
        variables = {"PYTHONPATH": f"{folder}/lib", "CXX": command}
        bits[name] = run(folder, sys.executable, str(ROOT / "tests/bits.py"), **variables)
        print(bits[name], f"==> {name}: testing", sep="", flush=True)
        tested = run(folder, sys.executable, "-m", "pytest", "-q", *TESTS, **variables)
        print(tested.splitlines()[-1], flush=True)
    if len(set(bits.values())) > 1:
        sys.exit("the builds' results have different bits: see above")
    print("all builds' results have the same bits")


if __name__ == "__main__":
    main()
