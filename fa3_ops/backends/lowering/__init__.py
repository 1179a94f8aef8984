"""From what FlashAttention-3 offers to what a kernel has, in small steps of plain torch.

Every step takes a call and returns one with the same meaning that needs less of a kernel. None but
drop_empty_sequences waits for the device. A step that copies keys or values says so in the notes of
the run and, where they are a cache, counts as a fallback.
"""
