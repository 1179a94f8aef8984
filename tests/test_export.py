"""torch.export, its decompositions, and AOTInductor with and without our Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sample_inputs import ints, rand
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from fa3_ops.ops import library

ops = torch.ops.fa3npu


class Decode(torch.nn.Module):
    def forward(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lens: Tensor
    ) -> Tensor:
        out, _ = ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lens, causal=True
        )
        return out + 1


class Train(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        out, _ = ops.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 64, 64, causal=True)
        return out


def decode_inputs(batch: int, capacity: int = 9) -> tuple[Tensor, ...]:
    return (
        rand(batch, 1, 4, 8),
        *(rand(batch, capacity, 2, 8), rand(batch, capacity, 2, 8)),
        *(rand(batch, 1, 2, 8), rand(batch, 1, 2, 8)),
        ints(*(i % capacity for i in range(batch))),
    )


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    batch = {0: Dim("batch")}
    cache = batch | {1: Dim("capacity")}
    shapes = (batch, cache, cache, batch, batch, batch)
    return export(Decode(), decode_inputs(3), dynamic_shapes=shapes)


def called(program: ExportedProgram) -> list[str]:
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return [n for n in names if n.startswith("fa3npu.")]


def check(module: object, *shape: int) -> None:
    """The module gives what eager gives, and writes the same caches."""
    torch.manual_seed(0)
    inputs = decode_inputs(*shape)
    copies = tuple(t.clone() for t in inputs)
    got = module(*inputs)  # type: ignore[operator]
    assert torch.equal(got, Decode()(*copies))
    assert torch.equal(inputs[1], copies[1])
    assert torch.equal(inputs[2], copies[2])


def test_export_at_several_shapes(program: ExportedProgram) -> None:
    for shape in ((2, 9), (3, 9), (5, 70)):
        check(program.module(), *shape)


def test_decompositions_split_append_and_attention(program: ExportedProgram) -> None:
    decomposed = program.run_decompositions()
    assert called(decomposed) == ["fa3npu.flash_attn_kvcache.default"]
    functionalized = [
        n.args[0] for n in decomposed.graph.nodes if "auto_functionalized" in str(n.target)
    ]
    assert functionalized == [ops.kvcache_append_.default]
    for shape in ((2, 9), (5, 70)):
        check(decomposed.module(), *shape)


def test_export_of_training() -> None:
    total = Dim("total")
    shapes = ({0: total}, {0: total}, {0: total}, {0: Dim("sequences")})
    inputs = (rand(7, 4, 8), rand(7, 2, 8), rand(7, 2, 8), ints(0, 3, 7))
    program = export(Train(), inputs, dynamic_shapes=shapes)
    larger = (rand(20, 4, 8), rand(20, 2, 8), rand(20, 2, 8), ints(0, 3, 7, 20))
    for arguments in (inputs, larger):
        assert torch.equal(program.module()(*arguments), Train()(*arguments))


@pytest.fixture(scope="module")
def package(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("aoti") / "decode.pt2"
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def test_aot_inductor_at_several_shapes(package: str) -> None:
    module = torch._inductor.aoti_load_package(package)
    for shape in ((2, 9), (3, 9), (5, 70)):
        check(module, *shape)


def test_aot_inductor_without_our_python(package: str, tmp_path: Path) -> None:
    """The library of operators is enough: fa3_ops is not imported where the package runs."""
    torch.manual_seed(1)
    inputs = decode_inputs(4, 30)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = f"""
import sys, torch
import torch._inductor.codecache  # torch 2.10 uses it in aoti_load_package without importing it
torch.ops.load_library({str(library.path())!r})
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
out = torch._inductor.aoti_load_package({package!r})(*inputs)
assert "fa3_ops" not in sys.modules
torch.save((out, inputs[1]), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    out, k_cache = torch.load(tmp_path / "out.pt")
    assert torch.equal(out, Decode()(*inputs))
    assert torch.equal(k_cache, inputs[1])
