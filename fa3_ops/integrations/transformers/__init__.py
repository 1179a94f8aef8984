"""fa3_ops as an attention implementation of transformers 5; docs/transformers.md is for its users.

    import fa3_ops.integrations.transformers
    fa3_ops.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fa3npu")

Where a configuration file can only name a module, `fa3_ops.integrations.transformers.registered`
registers when it is imported.
"""

from __future__ import annotations

import functools
from typing import Any

NAME = "fa3npu"
# transformers has continuous batching, and its vision towers their packed attention, only for a
# name with "flash" in it.
FLASH_NAME = "flash_fa3npu"
NAMES = (NAME, FLASH_NAME)


def register() -> None:
    """Gives transformers the attention implementations `fa3npu` and `flash_fa3npu`: one function by
    two names. Needs transformers 5.24 or later; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from fa3_ops.integrations.transformers.attention import attention
    from fa3_ops.integrations.transformers.masks import mask

    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    _let_flash_name_load()


def _let_flash_name_load() -> None:
    """transformers loads functions for every name with "flash" in it, and would look for a package
    or a kernel called so."""
    from transformers import modeling_flash_attention_utils as flash

    import fa3_ops

    load = flash._lazy_imports
    if getattr(load, "knows_fa3npu", False):
        return

    @functools.wraps(load)
    def lazy_imports(implementation: str | None, *arguments: Any, **named: Any) -> Any:
        if implementation != FLASH_NAME:
            return load(implementation, *arguments, **named)
        return (
            fa3_ops.flash_attn_func,
            fa3_ops.flash_attn_varlen_func,
            fa3_ops.flash_attn_with_kvcache,
            flash._pad_input,
            flash._unpad_input,
        )

    lazy_imports.knows_fa3npu = True  # type: ignore[attr-defined]
    flash._lazy_imports = lazy_imports
