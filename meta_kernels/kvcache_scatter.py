def kvcache_scatter_(*args: object, **kwargs: object) -> None:
    """Writes k_cache and v_cache, returns nothing."""
