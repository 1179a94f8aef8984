"""The rules of the tree that a reader relies on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "fa3_ops").rglob("*.py")) + sorted((ROOT / "meta_kernels").rglob("*.py"))
# Where one device's names may stand.
ITS_OWN = ("fa3_ops/backends/npu/", "fa3_ops/tools/", "fa3_ops/integrations/")
MOST_LINES = 60
MOST_LINES_OF_KERNELS = 85  # whose calls name thirty arguments, having no way to bundle them


def test_the_names_of_a_device_stand_in_its_folder_alone() -> None:
    elsewhere = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in PACKAGE
        if not str(path.relative_to(ROOT)).startswith(ITS_OWN)
        for line in path.read_text().splitlines()
        if re.search(r'"npu"|torch_npu', line)
    ]
    assert elsewhere == []


def bodies(path: Path) -> Iterator[tuple[str, int]]:
    """Every function and its lines behind signature and docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
            yield f"{path.relative_to(ROOT)}:{node.name}", lines


def test_every_function_fits_a_screen() -> None:
    long = {name: n for path in PACKAGE for name, n in bodies(path) if n > most_lines(path)}
    assert long == {}


def most_lines(path: Path) -> int:
    return MOST_LINES_OF_KERNELS if path.parent.name == "kernels" else MOST_LINES


def test_integrations_call_public_functions_alone() -> None:
    inside = r"(?m)^\s*(?:from|import) (fa3_ops\.(?!(?:integrations|batch_invariant)\b)\S+)"
    folder = ROOT / "fa3_ops" / "integrations"
    imports = {
        str(path.relative_to(ROOT)): re.findall(inside, path.read_text())
        for path in folder.rglob("*.py")
    }
    assert len(imports) > 1
    assert {path: names for path, names in imports.items() if names} == {}


@pytest.mark.parametrize(
    "module", ["fa3_ops.tools", "fa3_ops.testing", "fa3_ops.integrations", "torch_npu"]
)
def test_importing_the_package_leaves_the_rest_alone(module: str) -> None:
    code = f"import sys, fa3_ops; sys.exit({module!r} in sys.modules)"
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
