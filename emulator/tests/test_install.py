"""The distribution, installed; the command; and what is said where nothing can be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DISTRIBUTION = Path(__file__).parents[1]


def run(*command: object, where: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    given = {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=os.environ | given, cwd=where, capture_output=True, text=True)


def install_with_the_operator_of_the_readme(folder: Path) -> Path:
    source, site = folder / "source", folder / "site"
    shutil.copytree(DISTRIBUTION, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    readme = (source / "README.md").read_text()
    gelu = readme.partition("```cpp\n")[2].partition("```\n")[0]
    (source / "cann_emulator" / "csrc" / "ops" / "fast_gelu.cpp").write_text(gelu)
    offline = ("--no-index", "--no-build-isolation", "--no-deps", "--target", site)
    done = run(sys.executable, "-m", "pip", "install", *offline, source, where=folder)
    assert done.returncode == 0, done.stderr
    return site


def test_an_installed_copy_builds_itself_and_runs_a_script(tmp_path: Path) -> None:
    installed = install_with_the_operator_of_the_readme(tmp_path)
    (tmp_path / "script.py").write_text(
        """
import importlib.metadata, sys, torch, torch_npu, cann_emulator, flash_attn_npu_3
print((torch.ones(2, device="npu") + 1).tolist(), sys.argv)
print(cann_emulator.__file__)
print(importlib.metadata.version("flash_attn_npu"), flash_attn_npu_3.__version__)
x = torch.arange(4.0)
gelu = torch_npu.npu_fast_gelu(x.npu()).cpu()
print(torch.allclose(gelu, x * torch.sigmoid(1.702 * x)))
torch_npu.npu_fast_gelu(x.int().npu())
"""
    )
    command = (installed / "bin" / "cann_emulator", "script.py", "--device", "npu")
    done = run(*command, where=tmp_path, PYTHONPATH=installed, XDG_CACHE_HOME=tmp_path / "cache")
    assert "cann_emulator: building for torch " in done.stderr
    assert done.stdout.splitlines()[:4] == [
        "[2.0, 2.0] ['script.py', '--device', 'npu']",
        str(installed / "cann_emulator" / "__init__.py"),
        "0.4.2.post1 0.4.2.post1",
        "True",
    ]
    assert "aclnnFastGelu: x must be of a float type" in done.stderr


NO_HEADER = "c++ -include no-such-header"


@pytest.mark.parametrize("command", [("-m", "cann_emulator.build"), ("-c", "import cann_emulator")])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "no-such-compiler", ["cann_emulator cannot run no-such-compiler (No such file"]),
        (
            "CXX",
            NO_HEADER,
            ["does not build beside torch ", f"\n$ {NO_HEADER} ", "fatal error: no-s"],
        ),
        ("XDG_CACHE_HOME", "/dev/null", ["XDG_CACHE_HOME, now /dev/null, may name another"]),
    ],
)
def test_why_nothing_is_built_is_said(
    command: tuple[str, str], variable: str, value: str, said: list[str], tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": tmp_path} | {variable: value}
    done = run(sys.executable, *command, where=tmp_path, **environment)
    assert done.returncode == 1
    for text in said:
        assert text in done.stderr
    assert ("Traceback" in done.stderr) == (command[0] == "-c")
    assert not [path for path in tmp_path.glob("cann_emulator/*") if path.name != "lock"]


def output(*arguments: str, where: Path) -> str:
    done = run(sys.executable, "-m", "cann_emulator", *arguments, where=where)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("release", "found"), [("0.3", "0.3.0"), ("none", "None")])
def test_a_release_of_flash_attn_npu_by_name(release: str, found: str, tmp_path: Path) -> None:
    code = """
import importlib.metadata, sys
try:
    found = importlib.metadata.version("flash_attn_npu")
except importlib.metadata.PackageNotFoundError:
    found = None
print(found, sys.argv)
"""
    printed = output("--flash-attn-npu", release, "-c", code, "-m", "x", where=tmp_path)
    assert printed == f"{found} ['-c', '-m', 'x']\n"


def test_a_script_and_a_module_get_their_arguments_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "beside.py").write_text("import sys; print(__name__, sys.argv[1:])")
    (folder / "script.py").write_text("import beside, sys; print(__name__, sys.argv)")
    printed = output("folder/script.py", "-m", "x", "--flash-attn-npu", "0.3", where=tmp_path)
    arguments = ["-m", "x", "--flash-attn-npu", "0.3"]
    assert printed.splitlines() == [
        f"beside {arguments}",
        f"__main__ {['folder/script.py', *arguments]}",
    ]
    assert output("-m", "beside", "-c", where=folder) == "__main__ ['-c']\n"


def test_the_processes_of_a_script_have_npus_too(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    inner = "import torch; print((torch.ones(2, device='npu') + 1).tolist())"
    assert output("-c", code, inner, where=tmp_path) == "[2.0, 2.0]\n"
