"""A stand-in for flash_attn_npu, in several releases; see the README beside this file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
RELEASES = ("0.4", "0.3", "0.2")
_EXTENSIONS = {
    "0.4 for 910": "0.4/flash_attn_npu_3/flash_attn_npu_3.py",
    "0.4 for 950": "0.4/flash_attn_npu_3_950.py",
    "0.3 for 910": "0.3/flash_attn_npu_3/flash_attn_npu_3.py",
    "0.2 for 910": "0.2/flash_attn_npu_3.py",
}


def use(release: str) -> None:
    """Installs a release in this process, for what imports flash_attn_npu from now on."""
    if release not in RELEASES:
        raise ValueError(f"release must be one of {', '.join(RELEASES)}, got {release!r}")
    folders = [str(_HERE / name) for name in RELEASES]
    sys.path[:] = [str(_HERE / release), *(path for path in sys.path if path not in folders)]


def extension(build: str) -> ModuleType:
    """The raw extension of a build, such as "0.3 for 910", beside the release that is in use."""
    path = _HERE / _EXTENSIONS[build]
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_{build}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
