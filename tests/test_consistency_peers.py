"""What `python -m fa3_ops consistency` says of FlashAttention-3 itself, by a stand-in for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import hopper_kernels
import pytest
import torch
from torch import Tensor

from fa3_ops import __main__
from fa3_ops.backends import Attention, add_backend, remove_backend
from fa3_ops.backends.cuda.flash_attn_3 import FlashAttn3
from fa3_ops.tools import consistency
from fa3_ops.tools.consistency import peers
from fa3_ops.tools.consistency.case import Setting
from fa3_ops.tools.consistency.peers import Sizes

SMALL = Sizes(nheads=4, nheads_k=2, headdim=16, batch_size=3, seqlen=20, longest=40, repeats=3)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hopper_kernels.put(monkeypatch)
    backend = FlashAttn3()
    add_backend("cpu", Attention, backend)
    yield
    remove_backend("cpu", Attention, backend)


def test_nothing_is_said_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not peers.is_there("cpu")


def test_it_is_not_there_on_another_gpu(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.is_there("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (8, 0))
    assert not peers.is_there("cpu")


def test_the_share_of_elements_that_differ(
    installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By kernels that split unless they are told not to, and that know a prefill from a decode."""
    fwd = hopper_kernels.Kernels3.fwd

    def split(self: Any, q: Tensor, *more: Tensor, num_splits: int, **named: Any) -> Any:
        out, lse, *rest = fwd(self, q, *more, num_splits=num_splits, **named)
        if num_splits == 0 and len(q) > 1:
            out[..., :4] *= 1.01  # a quarter of the elements
        if q.shape[1] > 1:
            out[..., 8:] *= 1.01
        return out, lse, *rest

    monkeypatch.setattr(hopper_kernels.Kernels3, "fwd", split)
    monkeypatch.setattr(peers, "Sizes", lambda: SMALL)
    setting = Setting("cpu", torch.float32, 16, seqlens=(5, 1, 9))
    monkeypatch.setattr(consistency, "settings", lambda device, dtypes: [setting])
    assert __main__.main(["consistency", "--device", "cpu"]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    rows = re.findall(r"\| (.*) \| ([\d.]+)% \|", printed)
    shares = {what: float(share) for what, share in rows}
    assert shares.pop("decode alone and in a batch, num_splits=0") == pytest.approx(25, abs=2)
    assert shares.pop("last row of a prefill, and alone") == pytest.approx(50, abs=3)
    assert shares == {"decode alone and in a batch, num_splits=1": 0.0}
    assert re.search(r"A decode over 40 keys takes [\d.]+ times as long with num_splits=1", printed)
