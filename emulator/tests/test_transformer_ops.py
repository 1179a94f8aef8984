"""What transformers launch besides attention, against plain torch in float64."""

import cann_emulator
import pytest
import torch
import torch.nn.functional as F
import torch_npu
from acl.rt import memcpy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_rounded_once(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """got is float64's result but for float32's arithmetic and one rounding."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=max(eps, 1e-5), atol=1e-6)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(x.double(), gamma.shape, gamma.double(), epsilon)


@every_dtype
@pytest.mark.parametrize("gamma_dtype", ["same", "float32"])
def test_rms_norm(dtype: torch.dtype, gamma_dtype: str) -> None:
    x = torch.randn(3, 5, 64).to(dtype)
    gamma = torch.randn(64).to(dtype if gamma_dtype == "same" else torch.float32)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-3)
    assert_rounded_once(y, rms_norm(x, gamma, 1e-3))
    assert rstd.shape == (3, 5, 1)
    assert_rounded_once(rstd, (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt())


@every_dtype
def test_add_rms_norm(dtype: torch.dtype) -> None:
    a, b, gamma = torch.randn(7, 64).to(dtype), torch.randn(7, 64).to(dtype), torch.randn(64)
    y, rstd, total = torch_npu.npu_add_rms_norm(a.npu(), b.npu(), gamma.to(dtype).npu(), 1e-6)
    assert torch.equal(total.cpu(), a + b)
    assert_rounded_once(y, rms_norm(a + b, gamma.to(dtype), 1e-6))
    assert_rounded_once(rstd, ((a + b).double().square().mean(-1, keepdim=True) + 1e-6).rsqrt())


def test_rms_norm_refuses() -> None:
    x = torch.ones(2, 8).npu()
    with pytest.raises(RuntimeError, match="gamma must have the shape of the last dimensions of x"):
        torch_npu.npu_rms_norm(x, torch.ones(7).npu())
    with pytest.raises(RuntimeError, match="gamma must have the dtype of x, or float32"):
        torch_npu.npu_rms_norm(x, torch.ones(8).half().npu())


@every_dtype
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype)
    gate, up = x.double().chunk(2, -1)
    assert_rounded_once(torch_npu.npu_swiglu(x.npu()), F.silu(gate) * up)
    with pytest.raises(RuntimeError, match="x must have two equal halves"):
        torch_npu.npu_swiglu(torch.ones(3).npu())


@every_dtype
@pytest.mark.parametrize("is_neox_style", [True, False])
def test_rotary_embedding(is_neox_style: bool, dtype: torch.dtype) -> None:
    """The pairs of a head as complex numbers, turned."""
    positions, heads = torch.tensor([5, 0, 2]), (4, 2)
    angles = torch.rand(6, 8, dtype=torch.float64) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    cos, sin = table.double()[positions].chunk(2, -1)
    turn = torch.complex(cos, sin).unsqueeze(1)
    q, k = (torch.randn(3, n * 16).to(dtype) for n in heads)
    on_npu = [x.npu() for x in (q, k)]
    torch_npu._npu_rotary_embedding(positions.npu(), *on_npu, 16, table.npu(), is_neox_style)
    for x, got in zip((q, k), on_npu, strict=True):
        head = x.double().view(3, -1, 16)
        parts = head.chunk(2, -1) if is_neox_style else (head[..., ::2], head[..., 1::2])
        turned = torch.view_as_real(torch.complex(*parts) * turn)
        wanted = turned.transpose(-1, -2) if is_neox_style else turned
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            got.cpu().double(), wanted.reshape(3, -1), rtol=eps, atol=max(eps * 1e-2, 1e-6)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_embedding_by_a_table_in_float32(dtype: torch.dtype) -> None:
    """ATB's high precision, which bfloat16 does not have."""
    table, positions = torch.randn(6, 16).npu(), torch.tensor([5, 0, 2]).npu()
    x = torch.randn(3, 32).to(dtype).npu()
    q, k = x.clone(), x.clone()
    if dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match="float16 may have a float32 cos_sin_cache"):
            torch_npu._npu_rotary_embedding(positions, q, k, 16, table, True)
        return
    torch_npu._npu_rotary_embedding(positions, q, k, 16, table, True)
    wide = [x.float(), x.float()]
    torch_npu._npu_rotary_embedding(positions, *wide, 16, table, True)
    for got, wanted in zip((q, k), wide, strict=True):
        assert torch.equal(got.cpu(), wanted.cpu().to(dtype))


def test_reshape_and_cache() -> None:
    """Strided tokens, a slot that is padding, and everything else as it was."""
    key, value = torch.randn(2, 3, 2, 8).half().unbind()
    caches = torch.randn(2, 4, 16, 2, 8).half()
    on_npu = caches.npu()
    packed = torch.cat([key, value], dim=1).npu()
    slots = torch.tensor([50, -1, 3], dtype=torch.int32)
    torch_npu._npu_reshape_and_cache(packed[:, :2], packed[:, 2:], *on_npu, slots.npu())
    for cache, new in zip(caches, (key, value), strict=True):
        cache[3, 2], cache[0, 3] = new[0], new[2]
    assert torch.equal(on_npu.cpu(), caches)


def test_reshape_and_cache_refuses() -> None:
    key, cache = torch.ones(3, 2, 8).npu(), torch.zeros(4, 16, 2, 8).npu()
    slots = torch.zeros(3, dtype=torch.int32).npu()
    with pytest.raises(RuntimeError, match=r"slot_indices must be \(tokens,\) int32"):
        torch_npu._npu_reshape_and_cache(key, key, cache, cache, slots.long())
    with pytest.raises(RuntimeError, match="must have one dtype"):
        torch_npu._npu_reshape_and_cache(key.half(), key, cache, cache, slots)
    torch_npu._npu_reshape_and_cache(key, key, cache, cache, slots + 64)
    with pytest.raises(RuntimeError, match="slot 64 of 64"):
        torch.npu.synchronize()


def test_matmul_add_fp32() -> None:
    x, weight, out = torch.randn(6, 3).half(), torch.randn(6, 4).half(), torch.randn(3, 4)
    on_npu = out.npu()
    torch_npu._npu_matmul_add_fp32(x.npu(), weight.npu(), on_npu)
    wanted = out.double() + x.double().T @ weight.double()
    torch.testing.assert_close(on_npu.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_capture_records_them() -> None:
    x, table = torch.randn(2, 16).half(), torch.randn(4, 16).half().npu()
    buffer, positions = torch.zeros(2, 16).half().npu(), torch.tensor([0, 3]).npu()
    gamma = torch.randn(16).half().npu()
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y, _ = torch_npu.npu_rms_norm(buffer, gamma)
        torch_npu._npu_rotary_embedding(positions, y, y.clone(), 16, table, True)
    assert torch.equal(buffer.cpu(), torch.zeros(2, 16).half())
    buffer.copy_(x)
    graph.replay()
    wanted, _ = torch_npu.npu_rms_norm(x.npu(), gamma)
    torch_npu._npu_rotary_embedding(positions, wanted, wanted.clone(), 16, table, True)
    assert torch.equal(y.cpu(), wanted.cpu())


def test_work_may_write_inference_tensors_later() -> None:
    with torch.inference_mode():
        x = torch.zeros(2).npu()
        host = cann_emulator.host(x)
        cann_emulator.submit(lambda: host.add_(1))
    torch.npu.synchronize()
    assert x.cpu().tolist() == [1, 1]


def test_memcpy_from_python() -> None:
    x, y = torch.arange(4.0), torch.zeros(4).npu()
    torch.npu.synchronize()
    host_to_device = 1
    assert memcpy(y.data_ptr(), 16, x.data_ptr(), 16, host_to_device) == 0
    assert y.cpu().tolist() == x.tolist()
