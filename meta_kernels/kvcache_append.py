import torch


@torch.library.register_fake("fa3npu::kvcache_append_")
def kvcache_append_(*args: object, **kwargs: object) -> None:
    """Writes k_cache and v_cache, returns nothing."""
