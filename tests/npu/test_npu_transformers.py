"""transformers' Qwen3 on the emulated NPU, by the kernels that docs/npu.md names, and not by
npu_fusion_attention, which transformers' own flash attention takes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from continuous_batching import PROMPTS, rollout, trained
from launches import launches
from npu_calls import assert_same_tokens
from torch import Tensor
from transformers.generation.continuous_batching import input_outputs
from transformers.integrations import npu_flash_attention

import fa3_ops
import fa3_ops.integrations.transformers.registered
from fa3_ops import batch_invariant
from fa3_ops.integrations.transformers import NAMES

pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
LAYERS = tiny_models.DECODER["num_hidden_layers"]
LENGTH = 24
LIVE = torch.arange(LENGTH) >= torch.tensor([[0], [3], [11]])
# Of the largest number, against float32: what a model rounds to its dtype in some ten places.
TOLERANCE = {FLOAT: 2e-6, HALF: 6e-3, BF16: 5e-2}

every_name = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of npu_fusion_attention, which the emulator does not have."""
    calls: list[Any] = []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        raise NotImplementedError("npu_fusion_attention")

    monkeypatch.setattr(npu_flash_attention, "npu_fusion_attention", spy)
    return calls


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/transformers.md says: see TestGeneration.test_a_second_stream_does_not_wait."""
    monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: None)


def qwen3(name: str, dtype: torch.dtype, device: str = "npu", **differences: Any) -> Any:
    """Of the head dimension that flash_attn_npu's kernels are made for."""
    model = tiny_models.make("qwen3", name, head_dim=64, **differences)
    return model.to(dtype).to(device)


def padded(live: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tiny_models.tokens(3, LENGTH), "attention_mask": live.long()}


def packed() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in (13, 1, 26)])[None]
    return {"input_ids": tiny_models.tokens(1, 40), "position_ids": positions}


BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "whole": lambda: {"input_ids": tiny_models.tokens(3, LENGTH)},
    "packed": packed,
    "left": lambda: padded(LIVE),
    "right": lambda: padded(LIVE.flip(1)),
}


def step(model: Any, given: dict[str, Tensor]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """The loss of a training step, the logits of its tokens, and its gradients, on CPU."""
    live = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    # The first token behind padding would be told by a row of padding.
    told = live & F.pad(live, (1, 0), value=False)[:, :-1]
    given = given | {"labels": torch.where(told, given["input_ids"], -100)}
    out = model.train()(**{name: x.to(model.device) for name, x in given.items()}, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.cpu().float() for name, p in model.named_parameters()}
    return out.loss.item(), out.logits.detach().cpu().float()[live], gradients


def assert_near(
    got: tuple[float, Tensor, dict[str, Tensor]],
    want: tuple[float, Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    assert abs(got[0] - want[0]) < tolerance
    assert (got[1] - want[1]).abs().max() < tolerance * want[1].abs().max()
    assert got[2].keys() == want[2].keys()
    largest = max(gradient.abs().max() for gradient in want[2].values())
    for parameter in want[2]:
        difference = (got[2][parameter] - want[2][parameter]).abs().max()
        assert difference < tolerance * largest, parameter


class TestTraining:
    @every_name
    @every_dtype
    @pytest.mark.parametrize("batch", BATCHES)
    def test_as_eager_on_cpu(
        self, batch: str, dtype: torch.dtype, name: str, fused: list[Any]
    ) -> None:
        """In float32, with the same weights."""
        model = qwen3(name, dtype)
        eager = qwen3("eager", dtype, "cpu").float()
        with launches("npu") as launched:
            got = step(model, BATCHES[batch]())
        assert_near(got, step(eager, BATCHES[batch]()), TOLERANCE[dtype])
        # Of padding, whose lengths its backward does not take, torch operators make the gradient.
        gradient = "flash_attn_npu" if batch in ("whole", "packed") else "torch"
        assert launched == ["flash_attn_npu"] * LAYERS + [gradient] * LAYERS
        assert not fused

    @pytest.mark.parametrize("batch", BATCHES)
    def test_float32_is_served_by_torch_and_says_so(self, batch: str) -> None:
        model, eager = qwen3("fa3npu", FLOAT), qwen3("eager", FLOAT, "cpu")
        with (
            launches("npu") as launched,
            pytest.warns(fa3_ops.FallbackWarning, match=r"by torch, because .*torch\.float32"),
        ):
            got = step(model, BATCHES[batch]())
        assert_near(got, step(eager, BATCHES[batch]()), TOLERANCE[FLOAT])
        assert launched == ["torch"] * 2 * LAYERS

    def test_float32_is_refused_by_name_where_that_is_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FA3NPU_STRICT", "1")
        model = qwen3("fa3npu", FLOAT)
        with pytest.raises(NotImplementedError, match=r"dtype torch\.float32"):
            model(tiny_models.tokens(1, 5).npu())

    def test_autocast(self) -> None:
        """Weights in float32, attention in bfloat16."""
        model, eager = qwen3("fa3npu", FLOAT), qwen3("eager", FLOAT, "cpu")
        with torch.autocast("npu", BF16), launches("npu") as launched:
            got = step(model, BATCHES["packed"]())
        assert_near(got, step(eager, BATCHES["packed"]()), TOLERANCE[BF16])
        assert launched == ["flash_attn_npu"] * 2 * LAYERS

    def test_transformers_own_flash_attention_takes_another_kernel(self, fused: list[Any]) -> None:
        model = qwen3("flash_attention_2", HALF)
        with pytest.raises(NotImplementedError, match="npu_fusion_attention"):
            model(tiny_models.tokens(1, 5).npu())
        assert len(fused) == 1


NEW_TOKENS = 8


def generated(model: Any, cache: str | None) -> Any:
    """Greedily, behind padding on the left."""
    return model.generate(
        tiny_models.tokens(3, LENGTH).to(model.device),
        attention_mask=LIVE.long().to(model.device),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


class TestGeneration:
    @every_dtype
    @pytest.mark.parametrize(
        ("name", "cache"), [("fa3npu", None), ("fa3npu", "static"), ("flash_fa3npu", None)]
    )
    def test_tokens_of_the_cpu(
        self, name: str, cache: str | None, dtype: torch.dtype, fused: list[Any]
    ) -> None:
        with launches("npu") as launched:
            got = generated(qwen3(name, dtype), cache)
        want = generated(qwen3("eager", dtype, "cpu"), cache)
        new, wanted = (out.sequences[:, LENGTH:].cpu() for out in (got, want))
        assert_same_tokens(new, wanted, torch.stack(want.logits, 1).float(), 2 * TOLERANCE[dtype])
        assert launched == ["flash_attn_npu"] * LAYERS * NEW_TOKENS
        assert not fused

    @pytest.mark.usefixtures("one_stream")
    def test_continuous_batching(self, fused: list[Any]) -> None:
        with launches("npu") as launched:
            results = rollout(qwen3("flash_fa3npu", HALF), NEW_TOKENS)
        assert_greedy(results, qwen3("eager", HALF, "cpu"), 2 * TOLERANCE[HALF])
        assert set(launched) == {"flash_attn_npu"}
        assert not fused

    def test_a_second_stream_does_not_wait(self) -> None:
        """transformers computes a batch on a stream that does not wait for the one that its inputs
        are written on, whatever the attention. Here, where work is done when it is waited for,
        tokens are wrong; when they are not, docs/transformers.md has a remedy too many."""
        results = rollout(qwen3("sdpa", HALF), NEW_TOKENS)
        with pytest.raises(AssertionError):
            assert_greedy(results, qwen3("eager", HALF, "cpu"), 2 * TOLERANCE[HALF])


def assert_greedy(results: list[Any], model: Any, tie: float) -> None:
    """Whether these are the tokens that the model chooses, ties aside."""
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = model(torch.tensor([prompt + result.generated_tokens])).logits
        logits = logits[:, len(prompt) - 1 : -1].float()
        new = torch.tensor([result.generated_tokens])
        assert_same_tokens(new, logits.argmax(-1), logits, tie)


@pytest.mark.usefixtures("batch_invariant_ops")
class TestBits:
    """Of packed forward passes, as trainers make them, where linear layers promise theirs, too."""

    @every_dtype
    @pytest.mark.usefixtures("one_stream")
    def test_rollout(self, dtype: torch.dtype) -> None:
        """By continuous batching: prompts in chunks, requests that join and leave."""
        model = batch_invariant.convert(qwen3("flash_fa3npu", dtype))
        results = rollout(model, NEW_TOKENS)
        for result, want in zip(results, trained(model, results), strict=True):
            assert torch.equal(torch.tensor(result.logprobs), want)

    @pytest.mark.parametrize(("cache", "dtype"), [(None, BF16), ("static", HALF)], ids=str)
    def test_generate(self, cache: str | None, dtype: torch.dtype) -> None:
        model = batch_invariant.convert(qwen3("fa3npu", dtype))
        out = generated(model, cache)
        sequences = [ids[live] for ids, live in zip(out.sequences, whole(LIVE).npu(), strict=True)]
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None].npu()
        logits = model.train()(torch.cat(sequences)[None], position_ids=positions).logits[0]
        for i, part in enumerate(logits.split([len(ids) for ids in sequences])):
            got = torch.stack([step[i] for step in out.logits])
            assert torch.equal(got, part[-1 - NEW_TOKENS : -1].float())

    def test_explain_promises_them(self) -> None:
        model = batch_invariant.convert(qwen3("fa3npu", HALF))
        explained = fa3_ops.explain(model, **{name: x.npu() for name, x in packed().items()})
        assert {step.backend for step in explained.steps} == {
            "flash_attn_npu",
            "batch_invariant_ops",
        }
        assert explained.bitwise

    def test_a_cache_that_drops_keys_is_promised_nothing(self) -> None:
        model = tiny_models.make("mistral", head_dim=64).to(HALF).npu()
        cache = transformers.DynamicCache(config=model.config)
        ids = tiny_models.tokens(1, LENGTH + 1).npu()
        with torch.no_grad():
            model(ids[:, :-1], cache=cache)
            explained = fa3_ops.explain(model, ids[:, -1:], cache=cache)
        assert {step.backend for step in explained.steps} == {"flash_attn_npu"}
        assert not explained.bitwise


def whole(live: Tensor) -> Tensor:
    """With the tokens that are generated behind."""
    return F.pad(live, (0, NEW_TOKENS), value=True)
