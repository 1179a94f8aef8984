"""The operators as PyTorch sees them: what is registered for them besides kernels, and what every
call goes through before a kernel."""


def register() -> None:
    """Python's part of the operators, none of which belongs to one device."""
    from fa3_ops.ops import autocast, autograd, composite, flops, vmap, writes

    for part in (composite, autograd, writes, autocast, vmap, flops):
        part.register()
