"""The kernels, in what Triton 3.2 and later have on every device."""
