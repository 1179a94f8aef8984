def kvcache_append_(*args: object, **kwargs: object) -> None:
    """Writes k_cache and v_cache, returns nothing."""
