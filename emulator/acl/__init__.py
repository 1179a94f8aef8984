"""The module of that name that CANN brings along, in so far as programs of torch_npu ask for it."""
