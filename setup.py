"""Builds csrc/ into fa3_ops/_C.abi3.so; everything else is in pyproject.toml."""

import os
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

BUILT = os.environ.get("FA3NPU_BUILT")  # fa3_ops/_C.abi3.so is there already: see the Makefile
EMULATED_TILES = os.environ.get("FA3NPU_EMULATED_TILES")  # "1": AMX's, see `make test-amx`
SANITIZE = os.environ.get("FA3NPU_SANITIZE", "").split()  # "address undefined": see `make sanitize`

FLAGS = [  # tests/test_primitives.py compiles with them too
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",  # what is fused, csrc/cpu/tile/vector.h says
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # 2.10: one wheel for it and every later torch
    *(["-DFA3NPU_EMULATED_TILES"] if EMULATED_TILES else []),
]

if __name__ == "__main__":
    sanitizers = [f"-fsanitize={name}" for name in SANITIZE]
    extension = CppExtension(
        "fa3_ops._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=FLAGS + sanitizers,
        extra_link_args=sanitizers,
        py_limited_api=True,
    )
    setup(
        ext_modules=[] if BUILT else [extension],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
