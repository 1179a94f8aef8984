"""What the documents point at is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import test_backends

ROOT = Path(__file__).parents[1]
DOCUMENTS = (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md")
PATH = r"(?:fa3_ops|csrc|meta_kernels|tests|docs|emulator|benchmarks|examples|compat)/[\w/.*<>-]*"
FOLLOWED = ("life_of_a_call.md", "adding_a_backend.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_exists(document: Path) -> None:
    paths = set(re.findall(rf"`({PATH})`", document.read_text()))
    missing = [p for p in paths if "NAME" not in p and not list(ROOT.glob(p.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("document", FOLLOWED)
def test_every_name_is_found_where_it_is_said_to_be(document: str) -> None:
    """Such as "`choose` in `fa3_ops/backends/run.py`", or with the file in brackets."""
    text = (ROOT / "docs" / document).read_text()
    pairs = re.findall(rf"`(\w+)`\s+(?:in\s+|\()`({PATH})`", text)
    assert len(pairs) > 5
    defined = r"(?m)(?:def|class) {name}\b|^{name}\b|^\w[\w:<>*&, ]* {name}\("
    for name, path in pairs:
        assert re.search(defined.format(name=name), (ROOT / path).read_text()), (name, path)


def test_the_backend_of_the_document_is_the_tests() -> None:
    source = inspect.getsource(test_backends.Toy).strip()
    assert source in (ROOT / "docs" / "adding_a_backend.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
