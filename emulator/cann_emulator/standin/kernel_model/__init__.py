"""A model of the flash_attn_npu kernels on host memory; see ../README.md."""
