"""`python -m fa3_ops doctor` on CPU, with machines made of fakes."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fa3_ops
from fa3_ops import __main__
from fa3_ops.backends.cuda import flash_attn_3, flash_attn_4
from fa3_ops.backends.cuda.capabilities import FA3_FWD
from fa3_ops.backends.cuda.flash_attention import Package
from fa3_ops.backends.npu import device as npu_device
from fa3_ops.backends.npu.device import Kernel
from fa3_ops.testing import SampleCall, sample_calls
from fa3_ops.tools import consistency, crew, info
from fa3_ops.tools.consistency.case import Setting
from fa3_ops.tools.doctor import machine, results
from fa3_ops.tools.doctor.built_in import built_in_calls
from fa3_ops.tools.doctor.report import Report

SMALL = Setting("cpu", torch.float32, 16, seqlens=(5, 1, 9))
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts on a machine without NPU or GPU, with few samples and a short contract."""
    monkeypatch.setattr(machine, "import_torch_npu", lambda: "torch_npu is not installed")
    monkeypatch.setattr(machine, "no_gpu", lambda: "torch is built without CUDA")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    shorten(monkeypatch)


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "settings", lambda device: [SMALL])
    few = ("apply_rotary.default-0", "flash_attn_combine.default-0")
    monkeypatch.setattr(
        results, "sample_calls", lambda *args: (c for c in sample_calls(*args) if c.name in few)
    )


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    shutil.copy(GOLDEN / "fa2_alibi.safetensors", tmp_path)
    return tmp_path


def report_of(
    golden: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[str]]:
    status = __main__.main(["doctor", "--golden", str(golden), *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_report_on_cpu(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = report_of(golden, capsys)
    assert status == 0
    assert [line for line in lines if line.startswith("#")] == [
        "# fa3_ops doctor",
        "## Versions",
        "## Driver and CANN",
        "## Environment",
        "## NPU",
        "## CUDA",
        "## Results on cpu",
        "## Bitwise contract on cpu",
        "## Registration on cpu",
    ]
    assert f"- torch: {torch.__version__}" in lines
    assert "- no NPU here: torch_npu is not installed" in lines
    assert "- no CUDA here: torch is built without CUDA" in lines
    assert "- fa2_alibi.safetensors: 4 of 4 right, served by cpu (4)" in lines
    assert "- built-in, float16: 13 of 13 right, served by cpu (13)" in lines
    assert any(line.startswith("- gradients, bfloat16: right (") for line in lines)
    assert "- opcheck: 2 of 2 right" in lines
    assert "- summary: bitwise contract on cpu: 15 held" in lines
    assert lines[-1] == "**Verdict: all right on cpu; calls served by cpu (30)**"


def test_a_wrong_kernel_is_reported(
    golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fa3_ops.flash_attn_func

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("window_size") == (5, 0):
            kwargs["window_size"] = (4, 0)
        return right(*args, **kwargs)

    monkeypatch.setattr(fa3_ops, "flash_attn_func", wrong)
    status, lines = report_of(golden, capsys)
    assert status == 1
    assert "- built-in, float16: 12 of 13 right, served by cpu (13)" in lines
    (line,) = (line for line in lines if line.startswith("- built-in, float16, window (cpu)"))
    assert "FAILED: out errs by " in line
    assert "softmax_lse errs by " in line
    assert lines[-1] == (
        "**Verdict: 2 failed on cpu: built-in, float16, window (cpu), "
        "built-in, bfloat16, window (cpu)**"
    )


def test_an_append_that_writes_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fa3_ops.flash_attn_with_kvcache

    def forgetful(*, k_cache: torch.Tensor, v_cache: torch.Tensor, **kwargs: Any) -> Any:
        return right(k_cache=k_cache.clone(), v_cache=v_cache.clone(), **kwargs)

    call = built_in_calls(torch.float16)[-1]
    assert results.attempt_call(call, "cpu") == ("cpu", "")
    monkeypatch.setattr(fa3_ops, "flash_attn_with_kvcache", forgetful)
    _, wrong = results.attempt_call(call, "cpu")
    assert "k_cache differs by" in wrong
    assert "v_cache differs by" in wrong
    assert "out" not in wrong


def test_a_wrong_fake_kernel_is_reported(
    golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.library._scoped_library("fa3npu_doctor", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        library.impl("twice", lambda x: x.new_empty(len(x) + 1), "Meta")
        call = SampleCall("twice-0", torch.ops.fa3npu_doctor.twice.default, (torch.ones(3),), {})
        monkeypatch.setattr(results, "sample_calls", lambda *args: iter([call]))
        status, lines = report_of(golden, capsys)
    assert status == 1
    assert "- opcheck: 0 of 1 right" in lines
    (line,) = (line for line in lines if line.startswith("- opcheck, twice-0: FAILED: "))
    assert "test_faketensor failed" in line
    assert lines[-1] == "**Verdict: 1 failed on cpu: opcheck, twice-0**"


def test_a_crash_is_a_line(
    golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("aclnn 561002\nstack")

    monkeypatch.setattr(fa3_ops, "flash_attn_varlen_func", crash)
    monkeypatch.setattr(machine, "driver_version", crash)
    status, lines = report_of(golden, capsys)
    assert status == 1
    assert "- driver: FAILED: RuntimeError: aclnn 561002" in lines
    packed = "- built-in, float16, packed (no backend): FAILED: RuntimeError: aclnn 561002"
    assert packed in lines
    rows = [re.sub(" +", " ", line) for line in lines]
    assert "| alone or in any batch | error | RuntimeError: aclnn 561002 | cpu |" in rows
    assert "stack" not in lines


def test_other_device_than_there_is(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = report_of(golden, capsys, "--device", "npu")
    assert status == 1
    assert "- fa2_alibi.safetensors: 0 of 4 right, served by no backend (4)" in lines
    assert lines[-1].startswith("**Verdict: ")
    assert "failed on npu: NPU, " in lines[-1]


def test_no_gpu_where_one_is_named(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = report_of(golden, capsys, "--device", "cuda")
    assert status == 1
    assert "failed on cuda: CUDA, " in lines[-1]


def test_without_recorded_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = report_of(tmp_path, capsys)
    assert status == 0
    (line,) = (line for line in lines if line.startswith("- recorded calls"))
    assert "run this in a checkout of fa3_ops, or pass its tests/golden as --golden" in line


def test_broken_file_of_recorded_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{")
    status, lines = report_of(tmp_path, capsys)
    assert status == 1
    assert any(line.startswith("- recorded calls, half.safetensors: FAILED: ") for line in lines)


def test_recorded_errors_are_left_out() -> None:
    calls = results.right_calls(GOLDEN / "npu_v3.safetensors")
    assert len(calls) == 39
    assert "dv128_d64" not in {call.name for call in calls}


# ---- The machine -------------------------------------------------------------------------------


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_driver_and_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "npu-smi", 'echo "npu-smi 25.2.0 $1"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version.info")
    (tmp_path / "version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\nother=1\n")
    home = tmp_path / "toolkit"
    (home / "aarch64-linux").mkdir(parents=True)
    (home / "aarch64-linux" / "ascend_toolkit_install.info").write_text("path=x\nversion=8.5.0\n")
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(home))

    report = Report()
    machine.driver(report)
    text = "\n".join(report.lines)
    assert not report.failures
    assert "- driver: Version=25.2.0, ascendhal_version=7.35.23" in text
    assert "npu-smi 25.2.0 info" in text
    assert "- CANN: version=8.5.0 (" in text

    script(tmp_path / "npu-smi", "exit 3")
    machine.driver(report)
    assert report.failures == ["npu-smi"]
    (home / "aarch64-linux" / "ascend_toolkit_install.info").unlink()
    assert machine.cann_version() == f"no version file in {home}"


def test_versions_that_do_not_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for found, failures in (
        ("2.13.0", []),
        ("2.13.0.post2", []),
        ("not installed", []),
        ("2.9.0", ["torch and torch_npu"]),
    ):
        monkeypatch.setattr(info, "version", lambda name, found=found: found)
        report = Report()
        machine.versions(report)
        assert report.failures == failures
    assert (
        "- torch and torch_npu: FAILED: RuntimeError: torch_npu 2.9.0 is built for torch 2.9.0, "
        "not 2.13.0" in report.lines
    )


def test_emulation_is_not_taken_for_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cann_emulator", ModuleType("cann_emulator"))
    report = Report()
    machine.versions(report)
    assert "- CANN: EMULATED: no NPU computes anything of this report" in report.lines


@pytest.mark.parametrize(
    ("soc", "said"),
    [
        ("Ascend910B1", "Ascend910B1: the tables of 910"),
        ("Ascend950PR", "Ascend950PR: the tables of 950"),
        ("Ascend310P3", "neither a 910 nor a 950"),
    ],
)
def test_kernel_tables(monkeypatch: pytest.MonkeyPatch, soc: str, said: str) -> None:
    monkeypatch.setattr(npu_device, "soc_name", lambda: soc)
    assert said in machine.kernel_tables()


def test_flash_attn_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel((0, 4), ModuleType("flash_attn_npu_3.flash_attn_npu_3"), False)
    monkeypatch.setattr(npu_device, "soc_name", lambda: "Ascend910B1")
    monkeypatch.setattr(npu_device, "kernel", lambda: kernel)
    report = Report()
    machine.npu(report)
    assert (
        "- flash_attn_npu: 0.4, module flash_attn_npu_3.flash_attn_npu_3, "
        "table: 0.4 or later on 910B/C" in report.lines
    )
    monkeypatch.setattr(npu_device, "kernel", lambda: "flash_attn_npu is not installed")
    assert machine.flash_attn_npu() == "flash_attn_npu is not installed"
    monkeypatch.setattr(npu_device, "kernel", lambda: "flash_attn_npu does not load:\n no CANN")
    monkeypatch.setattr(info, "version", lambda name: "0.4.2")
    machine.npu(report)
    assert report.failures == ["flash_attn_npu"]


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "nvidia-smi", "echo 580.1; echo 580.1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    found.total_memory = 80 * 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    package = Package("0.0.3", None, FA3_FWD)
    monkeypatch.setattr(flash_attn_3, "package", lambda: package)
    monkeypatch.setattr(flash_attn_4, "package", lambda: "flash-attn-4 is not installed")
    report = Report()
    machine.cuda(report)
    assert not report.failures
    assert report.lines[1:] == [
        "- driver: 580.1",
        "- cuda:0: H100, compute capability 9.0, 132 processors, 80 GiB",
        "- backend flash_attn_3: fa3_fwd 0.0.3",
        "- backend flash_attn_4: flash-attn-4 is not installed",
    ]
    monkeypatch.setattr(info, "version", lambda name: "4.0")
    monkeypatch.setattr(flash_attn_4, "package", lambda: "flash-attn-4 does not load: no driver")
    machine.cuda(report)
    assert report.failures == ["backend flash_attn_4"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (
            "raise ImportError('libascendcl.so: cannot open')",
            "ImportError: libascendcl.so: cannot open",
        ),
        (
            # what torch_npu 2.13 and 2.14 do beside a CUDA build of torch
            "import os\n"
            "text = \"  what():  Duplicated key 'pinned_reserve_segment_size_mb' found in device\"\n"
            "os.write(2, f'terminate called after ...\\n{text}\\nframe #0: ...\\n'.encode())\n"
            "os.abort()",
            "its process ends with SIGABRT: Duplicated key 'pinned_reserve_segment_size_mb' found "
            "in device; torch 2.14.0+cu130 is a CUDA build, torch_npu wants a CPU build",
        ),
        ("import os\nos._exit(3)", "without a word"),
    ],
    ids=["raises", "aborts", "exits"],
)
def test_torch_npu_that_does_not_import(
    source: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(machine, "no_gpu", lambda: "torch is built without CUDA")
    shorten(monkeypatch)
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    if "CUDA" in why:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    status, lines = report_of(tmp_path, capsys)
    assert status == 1
    assert f"- no NPU here: torch_npu does not import: {why}" in lines
    assert "- built-in, float16: 13 of 13 right, served by cpu (13)" in lines
    assert lines[-1] == "**Verdict: 1 failed on cpu: NPU**"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("UNRELATED_TOKEN", "secret")
    report = Report()
    machine.environment(report)
    assert "- FA3NPU_STRICT: 1" in report.lines
    assert "- TASK_QUEUE_ENABLE: 2" in report.lines
    assert "secret" not in "\n".join(report.lines)


def test_where_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less is done, and who waits is told why."""
    settings = [SMALL, replace(SMALL, dtype=torch.bfloat16)]
    monkeypatch.setattr(crew, "compiles", lambda device: True)
    monkeypatch.setattr(consistency, "settings", lambda device: settings)
    assert __main__.main(["doctor", "--device", "cpu", "--processes", "1"]) == 0
    printed, told = capsys.readouterr()
    assert "- recorded calls: left out" in printed
    assert "\nOf bfloat16, headdim 16, causal; " in printed
    assert "- opcheck: 2 of 2 right" in printed
    assert told.startswith("Kernels that Triton does not have yet are compiled")
    assert "decode token by token: held" in told
