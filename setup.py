"""Builds csrc/ into fa3_ops/_C.abi3.so; everything else is in pyproject.toml."""

import os
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SANITIZE = os.environ.get("FA3NPU_SANITIZE", "").split()  # "address undefined": see `make sanitize`

extension = CppExtension(
    "fa3_ops._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    include_dirs=[os.path.abspath("csrc")],
    # 2.10: one wheel for it and every later torch.
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g0",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wall",
        "-Wno-psabi",
        "-fvisibility=hidden",
        *(f"-fsanitize={name}" for name in SANITIZE),
    ],
    extra_link_args=[f"-fsanitize={name}" for name in SANITIZE],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
