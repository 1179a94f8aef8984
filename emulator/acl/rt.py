"""acl.rt: the runtime from Python."""

import ctypes

import cann_emulator  # noqa: F401  loads the library
from cann_emulator.build import LIB

_acl = ctypes.CDLL(str(LIB / "libascendcl.so"))
_acl.aclrtMemcpy.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_size_t),
    ctypes.c_int,
)


def memcpy(to: int, room: int, source: int, size: int, kind: int) -> int:
    """aclrtMemcpy between addresses: returns its error code, 0 for none."""
    return int(_acl.aclrtMemcpy(to, room, source, size, kind))
