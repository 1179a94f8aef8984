"""The documents' tables of what each build of a kernel computes are what the data says."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch

from fa3_ops.backends.cuda import capabilities as cuda_data
from fa3_ops.backends.npu import capabilities as data
from fa3_ops.backends.npu.capabilities import Capabilities
from fa3_ops.backends.npu.flash_attn_npu import FlashAttnNpu

DOCUMENTS = Path(__file__).parents[1] / "docs"
BUILDS = (data.ASCEND_910_BEFORE_0_3, data.ASCEND_910_0_3, data.ASCEND_910, data.ASCEND_950)
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3"}


def numbers(values: Collection[int]) -> str:
    if not isinstance(values, range):
        return ", ".join(map(str, values))
    return f"{values[0]} to {values[-1]}" + (f" by {values.step}" if values.step > 1 else "")


def yes(can: bool) -> str:
    return "yes" if can else "no"


def dtypes(values: Collection[torch.dtype]) -> str:
    return ", ".join(SHORT[dtype] for dtype in values)


def of_build(can: Capabilities) -> dict[str, str]:
    """The column of a build of flash_attn_npu."""
    windows = yes(can.window) if can.window_of_few_rows else "not of few rows"
    return {
        "dtypes": dtypes(can.dtypes),
        "head dims of a cache": numbers(can.headdims),
        "head dims of activations": f"padded, to {max(can.headdims)}",
        "`headdim_v != headdim`": "yes" if can.headdim_v_differs else "padded",
        "page sizes in place": numbers(can.page_sizes),
        "causal, fewer keys than rows of q": yes(can.causal_of_few_keys),
        "windows": windows,
        "softcap": yes(can.softcap),
        "splits, at most": str(can.max_num_splits),
        "int8 k and v": "yes" if FlashAttnNpu.reads_narrow else "dequantised",
        "graph capture": "with metadata" if can.metadata else "no",
        "backward": yes(can.backward) if can.backward_window else "no windows",
        "ALiBi, `attention_chunk`, qv": "no",
    }


def of_fused() -> dict[str, str]:
    """What the column of FIA shares with the data."""
    can = data.CANN_8_5
    pages = f"{numbers(can.decode_pages)}, or {numbers(can.prefill_pages)}"
    narrow = "one row of q a sequence" if torch.int8 in can.narrow_dtypes else "dequantised"
    return {
        "dtypes": dtypes(can.dense_dtypes),
        "page sizes in place": pages,
        "int8 k and v": narrow,
    }


def pairs(headdims: cuda_data.HeadDims) -> str:
    """(range of headdim, range of headdim_v), of which some have one number."""
    beside = [
        " beside ".join(numbers(r) if len(r) > 1 else str(r[0]) for r in (of_v, of_k))
        for of_k, of_v in headdims
    ]
    return "; ".join(beside) or "no"


def of_hopper(can: cuda_data.Capabilities) -> dict[str, str]:
    """The column of a build of FlashAttention-3 or FlashAttention-4."""
    step = can.paged_step
    return {
        "dtypes": dtypes(can.dtypes),
        "head dims": numbers(can.headdims),
        "other `headdim_v`": pairs(can.unequal_headdims),
        "other `headdim_v` in FP8": pairs(can.unequal_headdims_fp8),
        "`headdim_v` of qv": pairs(can.qv_headdims),
        "`page_table`": f"head dims by {step}" if step > 1 else yes(can.page_table),
        "`window_size`": yes(can.window_size),
        "`attention_chunk`": "causal" if can.attention_chunk else "no",
        "`softcap`": yes(can.softcap),
        "`cache_leftpad`": yes(can.cache_leftpad),
        "`cache_batch_idx` of a dense cache": yes(can.cache_batch_idx),
        "sinks": "in the kernel" if can.sinks else "rescale the result",
        "splits, at most": str(can.max_num_splits),
        "backward": yes(can.backward),
        "deterministic backward to head dim": str(can.max_deterministic_headdim)
        if can.backward
        else "no",
        "GQA whose `headdim_v` differs, in the backward": yes(
            can.backward and can.grouped_unequal_backward
        ),
        "gradient of `softmax_lse`": yes(can.dsoftmax_lse),
    }


def table_below(line: str, document: str = "npu.md") -> list[list[str]]:
    text = (DOCUMENTS / document).read_text()
    lines = text[text.index(line) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]


def test_the_table_is_what_the_data_says() -> None:
    names, _, *rows = table_below("| | before 0.3 on")
    assert names[1:5] == [build.name for build in BUILDS]
    for column, build in enumerate(BUILDS, 1):
        assert {row[0]: row[column] for row in rows} == of_build(build)
    fused = {row[0]: row[5] for row in rows}
    assert {name: fused[name] for name in of_fused()} == of_fused()


def test_the_table_of_flash_attention_is_what_the_data_says() -> None:
    builds = (cuda_data.FLASH_ATTN_3, cuda_data.FA3_FWD, cuda_data.FLASH_ATTN_4)
    names, _, *rows = table_below("| | flash_attn_3 |", "cuda.md")
    assert names[1:] == [build.name for build in builds]
    for column, build in enumerate(builds, 1):
        assert {row[0]: row[column] for row in rows} == of_hopper(build)


def test_the_table_of_releases_is_what_the_data_says() -> None:
    _, _, *rows = table_below("| packed q | CANN 8.2")
    releases = (data.CANN_8_2, data.CANN_8_3, data.CANN_8_5)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["dtypes"] == [dtypes(sorted(r.dtypes, key=str, reverse=True)) for r in releases]
    assert cells["pages"] == [
        f"multiples of {r.page_sizes.step} to {r.page_sizes[-1]}" if r.page_sizes else "none"
        for r in releases
    ]
    band = [f"`headdim_v` {r.band_headdim_v}" if r.band else "no" for r in releases]
    assert cells["no mask"] == band
    few_keys = [yes(r.causal_of_few_keys) for r in releases]
    assert cells["causal with more rows of q than keys"] == few_keys
    assert cells["qv (GE only, any layout)"] == [yes(r.latent) for r in releases]
    known: set[str] = set()
    for text, release in zip(cells["head dims"], releases, strict=True):
        known |= set(re.findall(r"\(\d+, \d+\)", text))  # each adds to the one before
        assert known == set(map(str, release.headdims))
