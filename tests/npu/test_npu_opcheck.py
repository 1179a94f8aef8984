"""torch.library.opcheck on NPU tensors, without the utility that PyTorch has not built for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_opcheck import NAMES, few

from fa3_ops.testing import sample_calls

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """In float32, which plain torch serves, and in float16, which flash_attn_npu does."""
    (call,) = (call for call in sample_calls("npu", dtype) if call.name == name)
    assert "test_autograd_registration" not in call.test_utils
    torch.library.opcheck(call.operator, call.args, call.kwargs, test_utils=call.test_utils)


def test_the_lines_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = few(monkeypatch)
    lines = r"```python\n(import torch\nfrom fa3_ops.testing.*?)```"
    (code,) = re.findall(lines, README.read_text(), re.DOTALL)
    exec(code, {})
    assert checked == [*["flash_attn_func_backward"] * 3, "flash_attn_kvcache"]
