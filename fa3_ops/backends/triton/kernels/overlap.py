"""Two kernels of which the second starts while the first ends (programmatic dependent launch)."""

import triton
import triton.language as tl


@triton.jit
def start_dependents():
    """Lets the next kernel start where every program of this one has come so far or ended."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_predecessor():
    """For the end of the kernel before this one, and all that it wrote."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1
    )
