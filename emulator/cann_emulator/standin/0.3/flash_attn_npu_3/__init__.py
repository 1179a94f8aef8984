"""A stand-in for flash_attn_npu 0.3.0 on Ascend 910, raw alone; see ../../README.md."""

__version__ = "0.3.0"
