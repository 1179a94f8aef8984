"""What an editable installation does not show."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    configured = (ROOT / "pyproject.toml").read_text()
    folders = [file.parent for file in (ROOT / "fa3_ops").rglob("__init__.py")]
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert "fa3_ops.backends" in packages
    assert {name for name in packages if f'"{name}"' not in configured} == set()
