"""The emulated CANN keeps its promises (emulator/README.md): each test fails if one is broken."""

import math
import os
import signal
import subprocess
import sys

import cann_emulator
import pytest
import torch
import torch.nn.functional as F
import torch_npu
import torch_npu.dynamo.torchair  # makes the next import possible
import torchair
from cann_emulator import build, ir

STREAM_CAPTURED = "107027"


def run_python(
    *arguments: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def captured(fn, *args):
    """fn(*args), captured: the graph and the result, whose values only a replay writes."""
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        result = fn(*args)
    return graph, result


@pytest.fixture(scope="module")
def axpy():
    """An operator whose npu kernel is a submitted host function, as a kernel launch would be."""
    library = torch.library.Library("emulator_test", "DEF")
    library.define("axpy(Tensor x, Tensor y, float a) -> Tensor")

    def kernel(x, y, a):
        out = torch.empty_like(x)
        hosts = [cann_emulator.host(t) for t in (x, y, out)]
        cann_emulator.submit(lambda: hosts[2].copy_(a * hosts[0] + hosts[1]))
        return out

    library.impl("axpy", kernel, "PrivateUse1")
    library.impl("axpy", lambda x, y, a: torch.empty_like(x), "Meta")
    yield torch.ops.emulator_test.axpy
    library._destroy()


# aten ops

FUNCTIONS = {
    "broadcast": (lambda x, y: x + 2 * y, (3, 4), (4,)),
    "matmul": (torch.matmul, (2, 3, 4), (4, 5)),
    "linear": (F.linear, (2, 4), (5, 4), (5,)),
    "softmax": (lambda x: x.softmax(-1), (3, 4)),
    "logsumexp": (lambda x: x.logsumexp(-1), (3, 4)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (4,), w), (3, 4), (4,)),
    "gelu": (F.gelu, (3, 4)),
    "einsum": (lambda x, y: torch.einsum("bhd,bkd->bhk", x, y), (2, 3, 4), (2, 5, 4)),
    "index": (lambda x: x[torch.tensor([1, 0], device=x.device), :2], (3, 4)),
    "index by cpu tensor": (lambda x: x[torch.tensor([1, 0])], (3, 4)),
    "mask": (lambda x: x[x.detach() > 0], (3, 4)),
    "masked_fill": (lambda x: x.masked_fill(x.detach() > 0, -1.0), (3, 4)),
    "where": (lambda x: torch.where(x.detach() > 0, x, 0.5), (3, 4)),
    "cat": (lambda x, y: torch.cat([x, y]).t().contiguous(), (3, 4), (2, 4)),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 1]], device=x.device)), (2, 4)),
    "topk": (lambda x: x.topk(2)[0], (2, 4)),
    "max": (lambda x: x.max(1)[0] + x.amax(1), (2, 4)),
    "pad": (lambda x: F.pad(x, (1, 1)).flip(0).roll(1), (3, 4)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), (3, 4)),
    "sdpa": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (1, 2, 3, 4)),
    "zero size": (lambda x: x.sum(0), (0, 4)),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_aten_agrees_with_the_cpu_forward_and_backward(case):
    torch.manual_seed(0)
    fn, *shapes = FUNCTIONS[case]
    cpu = [torch.randn(shape, requires_grad=True) for shape in shapes]
    npu = [x.detach().npu().requires_grad_() for x in cpu]
    expected, actual = fn(*cpu), fn(*npu)
    assert actual.device.type == "npu"
    torch.testing.assert_close(actual.cpu(), expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad.npu())
    for x, y in zip(cpu, npu, strict=True):
        torch.testing.assert_close(y.grad.cpu(), x.grad)


def test_out_tensors_are_resized_and_keep_their_strides():
    ones = torch.ones(3, 4, device="npu")
    grown = torch.empty(0, device="npu")
    assert torch.add(ones, 1, out=grown) is grown
    assert grown.tolist() == [[2.0] * 4] * 3
    transposed = torch.empty(4, 3, device="npu").t()
    torch.mul(ones, 3, out=transposed)
    assert transposed.stride() == (1, 3)
    assert transposed.tolist() == [[3.0] * 4] * 3


def test_in_place_ops_write_through_views():
    def write(x):
        x[:, 1:3].add_(1)[0].mul_(3)
        x.t()[0].fill_(7)
        x[1:2].copy_(torch.arange(4.0))
        x[torch.tensor([3], device=x.device)] = 9.0
        return x

    expected = write(torch.zeros(4, 4))
    assert torch.equal(write(torch.zeros(4, 4, device="npu")).cpu(), expected)


def test_python_and_cpu_scalars_keep_type_promotion():
    half = torch.ones(2, dtype=torch.half, device="npu")
    assert (half * 2.5).dtype is torch.half
    assert (half.int() * 2.5).dtype is torch.float32
    assert (half * torch.tensor(2.5, dtype=torch.float64)).dtype is torch.half
    number = torch.tensor(2.0)
    doubled = half * number
    number.fill_(5)  # a kernel reads a CPU scalar when it is launched
    assert doubled.tolist() == [2.0, 2.0]


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="npu") + torch.ones(3)


def test_generators_are_seeded_saved_and_restored():
    torch.npu.manual_seed(3)
    first = torch.randn(4, device="npu")
    state = torch.npu.get_rng_state()
    second = torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="npu"), second)
    torch.npu.manual_seed(3)
    assert torch.equal(torch.randn(4, device="npu"), first)
    own = torch.Generator("npu").manual_seed(5)
    draws = [torch.randn(4, device="npu", generator=own) for _ in range(2)]
    assert not torch.equal(*draws)
    assert torch.equal(torch.randn(4, device="npu", generator=own.manual_seed(5)), draws[0])


def test_ops_without_an_emulation_fail_by_name():
    x = torch.ones(2, 4, device="npu")
    with pytest.raises(RuntimeError, match="Mish"):
        torch_npu.npu_mish(x)
    with pytest.raises(RuntimeError, match="aclnnGeluV2"):
        torch_npu.npu_gelu(x)
    assert (x + 1).sum().item() == 16


# Streams and memory


@pytest.mark.parametrize("wait", [True, False])
def test_a_missing_stream_wait_gives_wrong_numbers(wait):
    x = torch.ones(4, device="npu")
    torch.npu.synchronize()
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        tripled = x * 3
    if wait:
        torch.npu.current_stream().wait_stream(side)
    total = (tripled + 1).sum().item()
    torch.npu.synchronize()
    assert total == 16 if wait else math.isnan(total)


@pytest.mark.parametrize("wait", [True, False])
def test_an_event_orders_what_came_before_it(wait):
    x, side = torch.zeros(2, device="npu"), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(side):
        x.add_(1)
        event = torch.npu.Event()
        event.record()
        x.add_(1)
    if wait:
        event.wait()
    seen = x.clone().tolist()
    torch.npu.synchronize()
    assert seen == ([1.0, 1.0] if wait else [0.0, 0.0])
    assert x.tolist() == [2.0, 2.0]


def test_polling_an_event_or_a_stream_ends():
    x = torch.zeros(2, device="npu")
    torch.npu.synchronize()
    x.add_(1)
    event = torch.npu.Event()
    event.record()
    assert [event.query(), event.query()] == [False, True]
    x.add_(1)
    stream = torch.npu.current_stream()
    assert [stream.query(), stream.query()] == [False, True]


def test_work_is_queued_until_something_waits_for_it():
    x = torch.zeros(2, device="npu")
    torch.npu.synchronize()
    x.add_(1)
    calls = []
    cann_emulator.submit(lambda: calls.append(cann_emulator.host(x).tolist()))
    assert cann_emulator.pending() == 2
    assert calls == []
    cann_emulator.flush()
    assert cann_emulator.pending() == 0
    assert calls == [[1.0, 1.0]]


def test_the_error_of_queued_work_is_raised_by_the_synchronisation():
    def broken():
        raise ValueError("no such page")

    cann_emulator.submit(broken)
    with pytest.raises(RuntimeError, match="ValueError: no such page"):
        torch.npu.synchronize()
    torch.npu.synchronize()


def test_freeing_a_tensor_runs_nothing_and_keeps_its_bytes_for_queued_work():
    x = torch.ones(2, device="npu")
    torch.npu.synchronize()
    y = (x + 1) * 2  # x + 1 dies here
    assert cann_emulator.pending() == 2
    assert y.tolist() == [4.0, 4.0]


def test_memory_is_counted():
    torch.npu.synchronize()
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    x = torch.ones(1000, device="npu")
    assert torch.npu.memory_allocated() == before + x.nbytes
    del x
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() == before + 4000


def test_fresh_memory_is_poisoned():
    assert torch.empty(4, device="npu").isnan().all()


def test_a_write_past_the_end_of_a_tensor_aborts():
    script = (
        "import cann_emulator, torch, ctypes;"
        "x = torch.empty(10, dtype=torch.uint8, device='npu');"
        "ctypes.memset(x.data_ptr(), 0, 10 + {});"
        "torch.npu.synchronize(); print('survived')"
    )
    assert "survived" in run_python("-c", script.format(0)).stdout
    overrun = run_python("-c", script.format(1))
    assert overrun.returncode == -signal.SIGABRT
    assert "write past the end of device block" in overrun.stderr


# Capture


def test_a_capture_only_records_and_replays_see_new_inputs():
    x = torch.arange(4.0).npu()
    graph, y = captured(lambda: (2 * x).relu() + 1)
    assert y.isnan().all()
    graph.replay()
    assert y.tolist() == [1.0, 3.0, 5.0, 7.0]
    x.copy_(torch.tensor([-5.0, 5.0, 6.0, 7.0]))
    graph.replay()
    assert y.tolist() == [1.0, 11.0, 13.0, 15.0]


def test_in_place_ops_change_no_memory_at_capture():
    x, index, nine = torch.arange(4.0).npu(), torch.tensor([0]).npu(), torch.tensor(9.0).npu()

    def write():
        x.add_(1)
        x.index_put_((index,), nine)
        x.masked_fill_(x > 3, 0.0)
        x[1:2].copy_(nine)

    graph, _ = captured(write)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    graph.replay()
    assert x.tolist() == [0.0, 9.0, 3.0, 0.0]


FORBIDDEN = {
    "item": lambda x: x[0].item(),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "from the host": lambda x: torch.ones(4).npu(),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "write through a mask": lambda x: x.index_put_((x > 0,), x[0]),
    "unique": lambda x: x.unique(),
    "synchronize": lambda x: torch.npu.synchronize(),
    "stream.synchronize": lambda x: torch.npu.current_stream().synchronize(),
    "flush": lambda x: cann_emulator.flush(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_needs_the_host_fails_in_a_capture(what):
    x = torch.arange(4.0).npu()
    with pytest.raises(RuntimeError, match=STREAM_CAPTURED):
        captured(FORBIDDEN[what], x)
    assert (x + 1).sum().item() == 10  # the capture has ended, and the device works


def test_a_capture_records_submitted_functions(axpy):
    x, y = torch.ones(2, device="npu"), torch.ones(2, device="npu")
    graph, out = captured(lambda: axpy(x, y, 3.0) + 1)
    assert out.isnan().all()
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [3 * value + 2] * 2


@pytest.mark.parametrize("join", [True, False])
def test_a_captured_side_stream_must_be_joined(join):
    x = torch.ones(2, device="npu")

    def fork():
        side = torch.npu.Stream()
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y = x * 3
        if join:
            torch.npu.current_stream().wait_stream(side)
        return y + 1

    if not join:
        with pytest.raises(RuntimeError, match="107025"):
            captured(fork)
        return
    graph, out = captured(fork)
    graph.replay()
    assert out.tolist() == [4.0, 4.0]


def test_a_replay_keeps_only_the_order_that_the_capture_asked_for():
    x = torch.ones(2, device="npu")

    def fork_without_waiting_for_the_second_add():
        main, side = torch.npu.current_stream(), torch.npu.Stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            x.add_(1)
            event = torch.npu.Event()
            event.record()
            x.add_(1)
        main.wait_event(event)
        early = x.clone()
        main.wait_stream(side)
        return early, x.clone()

    graph, (early, late) = captured(fork_without_waiting_for_the_second_add)
    graph.replay()
    assert (early.tolist(), late.tolist()) == ([2.0, 2.0], [3.0, 3.0])


def test_each_replay_draws_new_random_numbers_from_the_seed():
    graph, x = captured(lambda: torch.randn(4, device="npu"))
    torch.npu.manual_seed(1)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(x.tolist())
    torch.npu.manual_seed(1)
    graph.replay()
    assert x.tolist() == draws[0] != draws[1]


def test_waiting_for_an_event_from_outside_the_capture_fails():
    event = torch.npu.Event()
    event.record()
    with pytest.raises(RuntimeError, match="107024"):
        captured(event.wait)


# Compilers


# In this order: torch_npu cannot set torchair up after npugraph_ex in one process.
@pytest.mark.parametrize("backend", ["reduce-overhead", "npugraph_ex", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_follow_their_inputs(axpy, backend):
    if backend == "reduce-overhead":
        config = torchair.CompilerConfig()
        config.mode = backend
        backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(
        lambda x, y: axpy(x, y, 2.0).relu() + 1, backend=backend, dynamic=False
    )
    y = torch.ones(4, device="npu")
    with torch.no_grad():
        for shift in range(3):
            x = torch.arange(4.0).npu() + shift
            assert compiled(x, y).tolist() == (2 * x + 2).tolist()


@pytest.fixture
def ge_axpy(axpy):
    """axpy as a GE operator of the user's."""
    cann_emulator.register_ir(
        "AxpyCustom", {"x": "required", "y": "required"}, {"z": "required"}, {"a": "VT_FLOAT"}
    )

    @torchair.register_fx_node_ge_converter(axpy.default)
    def convert(x, y, a: float, meta_outputs=None):
        attrs = {"a": torchair.ge.attr.Float(a)}
        return torchair.ge.custom_op(
            "AxpyCustom", inputs={"x": x, "y": y}, attrs=attrs, outputs=["z"]
        )

    return axpy


@pytest.mark.filterwarnings("ignore")
def test_a_ge_graph_is_built_with_a_custom_op_and_run_eagerly(ge_axpy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    config.debug.graph_dump.type = "pbtxt"
    backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(lambda x, y: ge_axpy(x, y, 2.0).relu(), backend=backend, dynamic=False)
    x = torch.arange(4.0).npu()
    with torch.no_grad():
        assert compiled(x, x).tolist() == [0.0, 3.0, 6.0, 9.0]
    dumped = "".join(path.read_text() for path in tmp_path.rglob("*.pbtxt"))
    assert 'op: "AxpyCustom"' in dumped
    assert 'op: "Relu"' in dumped


@pytest.mark.filterwarnings("ignore")
def test_running_a_ge_graph_says_that_it_is_not_emulated(ge_axpy):
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(lambda x: ge_axpy(x, x, 2.0), backend=backend, dynamic=False)
    with torch.no_grad(), pytest.raises(Exception, match="GE execution is not emulated"):
        compiled(torch.ones(2, device="npu"))


def test_definitions_of_canns_own_operators():
    attention = ir.definition("FusedInferAttentionScore")
    assert list(attention["inputs"])[:3] == ["query", "key", "value"]
    assert attention["inputs"]["key"] == "dynamic"
    assert len(attention["inputs"]) == 31
    assert list(attention["outputs"]) == ["attention_out", "softmax_lse"]
    assert attention["attrs"]["softmax_lse_flag"] == "VT_BOOL"
    scatter = ir.definition("ScatterPaKvCache")
    assert list(scatter["inputs"])[:5] == [
        "key",
        "key_cache",
        "slot_mapping",
        "value",
        "value_cache",
    ]
    with pytest.raises(KeyError, match="NoSuchOperator"):
        ir.definition("NoSuchOperator")


# Attention

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
NHEADS, NHEADS_K, D = 4, 2, 128
Q_LENS, KV_LENS = (3, 1, 5), (7, 300, 5)


def reference(q, k, v, scale, visible, sink=None):
    """Attention of one sequence in float64: q (q_len, heads, d), k and v (kv_len, heads_k, d)."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = lse.logaddexp(sink.double()[:, None])
    weights = (scores - lse[..., None]).exp().masked_fill(~visible, 0.0)
    lse = lse.masked_fill(~visible.any(-1), torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.t()


def visible(q_len, kv_len, sparse_mode, pre_tokens=0, next_tokens=0):
    ahead = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    if sparse_mode == 0:
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    if sparse_mode == 2:
        return ahead <= 0
    ahead = ahead - (kv_len - q_len)
    return ahead <= 0 if sparse_mode == 3 else (-pre_tokens <= ahead) & (ahead <= next_tokens)


def sequences(headdim=D, headdim_v=None, heads_k=NHEADS_K, dtype=torch.half, q_lens=Q_LENS):
    torch.manual_seed(0)
    make = lambda length, heads, d: torch.randn(length, heads, d).to(dtype)  # noqa: E731
    q = [make(n, NHEADS, headdim) for n in q_lens]
    k = [make(n, heads_k, headdim) for n in KV_LENS]
    v = [make(n, heads_k, headdim_v or headdim) for n in KV_LENS]
    return q, k, v


def cumulative(lengths):
    return torch.tensor(lengths).cumsum(0).tolist()


def padded(parts, layout):
    batch = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    batch = {"BSND": batch, "BNSD": batch.transpose(1, 2), "BSH": batch.flatten(2)}[layout]
    return batch.contiguous().npu()


def paged(parts, block_size, by_head):
    """A cache whose blocks are in random order, and the block table."""
    counts = [-(-len(part) // block_size) for part in parts]
    order = torch.randperm(sum(counts) + 2).tolist()
    cache = parts[0].new_full((len(order), block_size, *parts[0].shape[1:]), torch.nan)
    table = torch.full((len(parts), max(counts)), -1, dtype=torch.int32)
    for b, part in enumerate(parts):
        for i, piece in enumerate(part.split(block_size)):
            table[b, i] = order.pop()
            cache[table[b, i], : len(piece)] = piece
    cache = cache.transpose(1, 2).contiguous() if by_head else cache.flatten(2)
    return cache.npu(), table.npu()


def attend(q, k, v, layout, sparse_mode=0, pages=None, by_head=False, **options):
    """CANN's fused attention of sequences, given back as one (out, lse) per sequence."""
    q_lens, kv_lens = [len(x) for x in q], [len(x) for x in k]
    call = {
        "num_heads": q[0].shape[1],
        "num_key_value_heads": k[0].shape[1],
        "input_layout": layout,
        "scale": 0.1,
        "sparse_mode": sparse_mode,
        "atten_mask": TRIANGLE.npu() if sparse_mode else None,
        "softmax_lse_flag": True,
        "actual_seq_lengths": cumulative(q_lens) if layout == "TND" else q_lens,
        "actual_seq_lengths_kv": cumulative(kv_lens) if layout == "TND" and not pages else kv_lens,
    }
    join = (lambda parts: torch.cat(parts).npu()) if layout == "TND" else None
    join = join or (lambda parts: padded(parts, layout))
    query = join(q)
    if pages:
        state = torch.get_rng_state()
        key, call["block_table"] = paged(k, pages, by_head)
        torch.set_rng_state(state)
        value, _ = paged(v, pages, by_head)
        call["block_size"] = pages
    else:
        key, value = join(k), join(v)
    out, lse = torch_npu.npu_fused_infer_attention_score(query, key, value, **(call | options))
    out, lse = out.cpu(), lse.cpu()
    if layout == "TND":
        return list(zip(out.split(q_lens), lse[..., 0].split(q_lens), strict=True))
    heads = q[0].shape[1]
    out = {"BSND": out, "BNSD": out.transpose(1, 2), "BSH": out.unflatten(-1, (heads, -1))}[layout]
    return [(out[b, :n], lse[b, :, :n, 0].t()) for b, n in enumerate(q_lens)]


def assert_attention(results, q, k, v, sparse_mode=0, dtype=torch.half, **band):
    tolerance = {torch.half: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for (out, lse), *parts in zip(results, q, k, v, strict=True):
        mask = visible(len(parts[0]), len(parts[1]), sparse_mode, **band)
        expected, expected_lse = reference(*parts, 0.1, mask)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pages", [None, 16, 128])
@pytest.mark.parametrize("sparse_mode", [0, 2, 3])
@pytest.mark.parametrize("layout", ["TND", "BSND", "BNSD", "BSH"])
def test_attention_agrees_with_float64(layout, sparse_mode, pages):
    if pages == 16 and layout != "TND":
        pages = 256
    parts = sequences()
    by_head = layout == "BNSD"
    results = attend(*parts, layout, sparse_mode, pages, by_head)
    assert_attention(results, *parts, sparse_mode)


@pytest.mark.parametrize("layout", ["TND", "BNSD"])
@pytest.mark.parametrize(("pre", "next_"), [(0, 0), (2, 0), (3, 2), (1, -1), (400, 0)])
def test_a_band_is_aligned_bottom_right_and_inclusive(layout, pre, next_):
    parts = sequences()
    results = attend(*parts, layout, 4, pre_tokens=pre, next_tokens=next_)
    assert_attention(results, *parts, 4, pre_tokens=pre, next_tokens=next_)


@pytest.mark.parametrize("sparse_mode", [2, 3, 4])
def test_a_single_query_row_ignores_the_sparse_mode_unless_tnd(sparse_mode):
    parts = sequences(q_lens=(1, 1, 1))
    band = {"pre_tokens": 1, "next_tokens": -1}
    assert_attention(attend(*parts, "BSND", sparse_mode, **band), *parts, 0)
    assert_attention(attend(*parts, "TND", sparse_mode, **band), *parts, sparse_mode, **band)


def test_a_mask_of_the_other_convention_gives_wrong_numbers():
    parts = sequences()
    results = attend(*parts, "TND", 3, atten_mask=~TRIANGLE.npu())
    with pytest.raises(AssertionError):
        assert_attention(results, *parts, 3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_full_mask_hides_where_it_is_one(dtype):
    q, k, v = sequences()
    torch.manual_seed(1)
    mask = torch.rand(3, 1, 5, 300) < 0.5
    results = attend(q, k, v, "BSND", 0, atten_mask=mask.to(dtype).npu())
    for b, (out, _) in enumerate(results):
        sees = ~mask[b, 0, : len(q[b]), : len(k[b])]
        expected, _ = reference(q[b], k[b], v[b], 0.1, sees)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_rows_without_a_key_give_zero_and_plus_infinity():
    q, k, v = sequences()
    k[0], v[0] = k[0][:0], v[0][:0]  # no keys at all
    k[2], v[2] = k[2][:2], v[2][:2]  # 5 rows, 2 keys: the first 3 rows see none
    results = attend(q, k, v, "TND", 3)
    for out, lse in (results[0], [x[:3] for x in results[2]]):
        assert out.eq(0).all()
        assert lse.eq(torch.inf).all()
    assert_attention(results, q, k, v, 3)


def test_attention_in_bfloat16_with_one_key_head():
    parts = sequences(heads_k=1, dtype=torch.bfloat16)
    assert_attention(attend(*parts, "TND", 3), *parts, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize("headdim_v", [128, 192])
def test_attention_with_head_dim_192(headdim_v):
    parts = sequences(192, headdim_v)
    assert_attention(attend(*parts, "TND", 3), *parts, 3)


@pytest.mark.parametrize("pages", [None, 128])
def test_latent_attention_adds_the_rope_scores(pages):
    q, k, _ = sequences(512 + 64, heads_k=1)
    latent = [x[..., :512].contiguous() for x in k]
    options = {
        "query_rope": torch.cat([x[..., 512:] for x in q]).contiguous().npu(),
        "softmax_lse_flag": False,
    }
    rope = [x[..., 512:].contiguous() for x in k]
    state = torch.get_rng_state()
    options["key_rope"] = paged(rope, pages, False)[0] if pages else torch.cat(rope).npu()
    torch.set_rng_state(state)
    nope = [x[..., :512].contiguous() for x in q]
    query, out_of = torch.cat(nope).npu(), [len(x) for x in q]
    if pages:
        key, table = paged(latent, pages, False)
        options |= {"block_table": table, "block_size": pages}
    else:
        key = torch.cat(latent).npu()
    lengths = [len(x) for x in k]
    out, _ = torch_npu.npu_fused_infer_attention_score(
        *(query, key, key),
        num_heads=NHEADS,
        num_key_value_heads=1,
        input_layout="TND",
        scale=0.1,
        sparse_mode=3,
        atten_mask=TRIANGLE.npu(),
        actual_seq_lengths=cumulative(out_of),
        actual_seq_lengths_kv=lengths if pages else cumulative(lengths),
        **options,
    )
    for part, *row in zip(out.cpu().split(out_of), q, k, latent, strict=True):
        expected, _ = reference(*row, 0.1, visible(len(row[0]), len(row[1]), 3))
        torch.testing.assert_close(part.double(), expected, rtol=4e-3, atol=4e-3)


def test_version_2_has_learnable_sinks():
    q, k, v = sequences(dtype=torch.bfloat16)
    sink = torch.randn(NHEADS).bfloat16()
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        *(torch.cat(x).npu() for x in (q, k, v)),
        num_query_heads=NHEADS,
        num_key_value_heads=NHEADS_K,
        input_layout="TND",
        softmax_scale=0.1,
        actual_seq_qlen=cumulative(Q_LENS),
        actual_seq_kvlen=cumulative(KV_LENS),
        learnable_sink=sink.npu(),
        return_softmax_lse=True,
    )
    rows = zip(q, k, v, out.cpu().split(Q_LENS), lse.cpu().split(Q_LENS), strict=True)
    for *parts, part, part_lse in rows:
        expected, expected_lse = reference(
            *parts, 0.1, visible(len(parts[0]), len(parts[1]), 0), sink
        )
        torch.testing.assert_close(part.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(part_lse[..., 0].double(), expected_lse, rtol=1e-4, atol=1e-4)


REFUSED = {
    "head dim of TND": ("head dim 128", {"headdim": 64}, {"layout": "TND"}),
    "head dim": ("multiple of 16", {"headdim": 72}, {"layout": "BSND"}),
    "dtype": ("float16 or bfloat16", {"dtype": torch.float32}, {"layout": "BSND"}),
    "layout": ("emulated layouts", {}, {"layout": "BSND", "input_layout": "BSND_NBSD"}),
    "no mask": ("need an atten_mask", {}, {"layout": "TND", "sparse_mode": 3, "atten_mask": None}),
    "mask shape": (
        "2048, 2048",
        {},
        {"layout": "TND", "sparse_mode": 3, "atten_mask": torch.ones(128, 128).bool()},
    ),
    "mask dtype": (
        "bool, int8 or uint8",
        {},
        {"layout": "TND", "sparse_mode": 3, "atten_mask": TRIANGLE.half()},
    ),
    "lengths beyond the keys": (
        "outside key",
        {},
        {"layout": "BSND", "actual_seq_lengths_kv": [301, 1, 1]},
    ),
    "decreasing ends": ("cumulative ends", {}, {"layout": "TND", "actual_seq_lengths": [3, 2, 9]}),
    "ends short of the tokens": (
        "number of query tokens",
        {},
        {"layout": "TND", "actual_seq_lengths": [3, 4, 8]},
    ),
    "key heads": ("that of key", {}, {"layout": "BSND", "num_key_value_heads": 4}),
    "heads": ("divide num_heads", {}, {"layout": "BSND", "num_key_value_heads": 3}),
    "block size": ("multiple of 128", {}, {"layout": "BSND", "pages": 64}),
    "block size of TND": ("multiple of 16", {}, {"layout": "TND", "pages": 24}),
    "block table": (
        "int32",
        {},
        {"layout": "TND", "pages": 128, "block_table": torch.zeros(3, 3, dtype=torch.int64)},
    ),
    "pages by head in BSND": (
        "BSH and BSND take",
        {},
        {"layout": "BSND", "pages": 128, "by_head": True},
    ),
    "sparse mode": ("0 to 4", {}, {"layout": "TND", "sparse_mode": 5}),
    "pse_shift": (
        "not emulated",
        {},
        {"layout": "BSND", "pse_shift": torch.zeros(1, 4, 5, 300).half()},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_attention_refuses_what_cann_does_not_support(what):
    message, shapes, options = REFUSED[what]
    options = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(RuntimeError, match=message):
        attend(*sequences(**shapes), **options)


def test_attention_refuses_strided_tensors():
    q = torch.randn(3, 8, NHEADS, D).half().npu()
    with pytest.raises(RuntimeError, match="non-contiguous"):
        torch_npu.npu_fused_infer_attention_score(
            *(q[:, :4], q, q), num_heads=NHEADS, input_layout="BSND"
        )


@pytest.mark.filterwarnings("ignore")
def test_host_lengths_of_a_captured_attention_are_frozen_unless_updated():
    q = torch.randn(1, 1, 2 * D).half().npu()
    k = torch.randn(8, 128, 2 * D).half().npu()
    table = torch.arange(8, dtype=torch.int32).view(1, 8).npu()

    def call(length):
        return torch_npu.npu_fused_infer_attention_score(
            *(q, k, k),
            num_heads=2,
            input_layout="BSH",
            scale=0.1,
            block_table=table,
            block_size=128,
            actual_seq_lengths_kv=[length],
        )[0]

    short, long = call(200).cpu(), call(700).cpu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = call(200)
    graph.replay()
    assert torch.equal(out.cpu(), short)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [700]}])
    graph.replay()
    assert torch.equal(out.cpu(), long)


# Writing to a paged cache


def scatter(slots, **changes):
    torch.manual_seed(0)
    call = {
        "key": torch.randn(len(slots), 2, 16).half().npu(),
        "value": torch.randn(len(slots), 2, 8).half().npu(),
        "key_cache": torch.zeros(3, 4, 2, 16).half().npu(),
        "value_cache": torch.zeros(3, 4, 2, 8).half().npu(),
        "slot_mapping": torch.tensor(slots, dtype=torch.int32).npu(),
        "cache_mode": "Norm",
    } | changes
    torch_npu.npu_scatter_pa_kv_cache(**call)
    torch.npu.synchronize()
    return call


def test_scatter_writes_the_slots_and_nothing_else():
    slots = [0, 5, 11, 6]
    call = scatter(slots)
    for tokens, cache in (("key", "key_cache"), ("value", "value_cache")):
        expected = torch.zeros_like(call[cache].cpu()).flatten(0, 1)
        expected[slots] = call[tokens].cpu()
        assert torch.equal(call[cache].cpu().flatten(0, 1), expected)


def test_scatter_skips_negative_slots_and_copies_bytes():
    tokens = torch.arange(-32, 32, dtype=torch.int8).view(2, 2, 16).npu()
    caches = {
        f"{x}_cache": torch.zeros(3, 4, 2, 16, dtype=torch.int8).npu() for x in ("key", "value")
    }
    call = scatter([-1, 5], key=tokens, value=tokens, **caches)
    expected = torch.zeros(12, 2, 16, dtype=torch.int8)
    expected[5] = tokens[1].cpu()
    for cache in caches:
        assert torch.equal(call[cache].cpu().flatten(0, 1), expected)


def test_scatter_lets_no_caller_rely_on_the_last_of_equal_slots():
    call = scatter([5, 5])
    assert torch.equal(call["key_cache"].cpu().flatten(0, 1)[5], call["key"][0].cpu())


@pytest.mark.parametrize(
    ("message", "changes"),
    {
        "mode": ("cache_mode Norm", {"cache_mode": "PA_NZ"}),
        "dtype": ("one dtype", {"key_cache": torch.zeros(3, 4, 2, 16)}),
        "strided tokens": (
            "must be contiguous",
            {"key": torch.zeros(2, 16, 2).half().mT},
        ),
        "strided cache": (
            "caches must be contiguous",
            {"key_cache": torch.zeros(3, 2, 4, 16).half().mT},
        ),
        "shape": ("num_blocks, block_size", {"key_cache": torch.zeros(3, 2, 4, 16).half()}),
        "slot dtype": ("int32 or int64", {"slot_mapping": torch.zeros(2)}),
        "slots": (r"\(tokens,\)", {"slot_mapping": torch.zeros(3, dtype=torch.int32)}),
        "slot range": (r"slot 12 .* outside \[0, 12\)", {"slot_mapping": torch.tensor([0, 12])}),
    }.values(),
)
def test_scatter_refuses_what_cann_does_not_support(message, changes):
    npu = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        scatter([0, 1], **npu)


# Devices, and the command line


def test_two_devices():
    script = (
        "import cann_emulator, torch;"
        "x = torch.ones(2, device='npu:1');"
        "y = (x + 1).to('npu:0');"
        "print(torch.npu.device_count(), x.device, y.device, y.tolist());"
        "x + y"
    )
    done = run_python("-c", script, CANNEMU_DEVICES="2")
    assert done.stdout.splitlines()[0] == "2 npu:1 npu:0 [2.0, 2.0]"
    assert "Expected all tensors to be on the same device" in done.stderr


@pytest.mark.parametrize("soc", ["Ascend910_9391", "Ascend950PR_9579", "Ascend310P3"])
def test_the_soc_is_a_setting(soc):
    script = "import torch; print(torch.npu.get_device_name(0), (torch.ones(2).npu() + 1).tolist())"
    done = run_python("-m", "cann_emulator", "-c", script, CANNEMU_SOC=soc, CANNEMU_DEVICES="1")
    assert done.stdout.strip() == f"{soc} [2.0, 2.0]"
    assert f"the npu is emulated (1 x {soc})" in done.stderr


def test_a_script_runs_unchanged(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], torch.ones(2).to('npu').device)\n")
    done = run_python("-m", "cann_emulator", str(script), "--device", "npu")
    assert done.stdout.strip() == "['--device', 'npu'] npu:0"


def test_without_laziness_work_runs_when_it_is_submitted():
    script = (
        "import cann_emulator as c, torch;"
        "x = torch.ones(2).npu(); x.add_(1);"
        "print(c.pending(), c.host(x).tolist())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CANNEMU_LAZY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0 [2.0, 2.0]"


def test_the_build_is_up_to_date_and_needs_no_torch():
    done = run_python("-X", "importtime", "-m", "cann_emulator.build")
    assert done.stdout.strip() == "cann_emulator: up to date"
    assert not any(line.endswith((" torch", " torch_npu")) for line in done.stderr.splitlines())
    assert build.up_to_date()


def test_a_storage_may_die_while_a_kernel_waits_for_python() -> None:
    """The thread in which it dies holds Python's lock, which the kernel needs to go on."""
    code = """
import threading, time
import cann_emulator, torch
storages = [torch.empty(8, device="npu").untyped_storage() for _ in range(50)]
cann_emulator.submit(lambda: [time.sleep(0.01) for _ in range(50)])
def drop():
    while storages:
        storages.pop()
        time.sleep(0.005)
thread = threading.Thread(target=drop)
thread.start()
cann_emulator.flush()
thread.join()
print("done")
"""
    done = run_python("-c", code, timeout=60, CANNEMU_LAZY="1", PYTORCH_NO_NPU_MEMORY_CACHING="1")
    assert "done" in done.stdout
