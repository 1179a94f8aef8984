"""Builds the emulated CANN libraries for the torch and torch_npu of the running Python.

`python -m cann_emulator.build` writes them to cann_emulator/lib, unless they are up to date.
"""

import ctypes
import hashlib
import os
import subprocess
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
VERSIONS = [f"{package}-{version(package)}" for package in ("torch", "torch_npu")]
LIB = HERE / "lib" / "-".join(VERSIONS)
SITE = Path(sysconfig.get_paths()["purelib"])

# The libraries that torch_npu links to or opens. All symbols live in the first, which the others
# only load.
LIBRARIES = [
    *("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph"),
    *("fmk_parser", "acl_tdt_channel", "ascend_protobuf", "atb"),
]

# What torch_npu takes from CANN and the emulator does not implement fails by name, except what is
# right to do nothing: logs, profiling, and descriptions for ops that are then refused by name.
HARMLESS = ("HcclSetConfig", "Msprof", "aclAppLog", "aclmdl", "aclop")
HARMLESS += ("aclCreate", "aclDestroy", "aclGetTensorDesc", "aclSetTensor")


def symbols(library: Path, which: str) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", which, library], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines() if line.split()}


def undefined_symbols() -> list[str]:
    """What torch_npu takes from CANN: what nothing else in the process defines."""
    npu = sorted((SITE / "torch_npu").rglob("*.so"))
    defined = set()
    for library in [*npu, *(SITE / "torch" / "lib").glob("*.so*")]:
        defined |= symbols(library, "--defined-only")
    system = [
        ctypes.CDLL(name)
        for name in (
            "libc.so.6",
            "libm.so.6",
            "libstdc++.so.6",
            "libgcc_s.so.1",
            "ld-linux-x86-64.so.2",
        )
    ]
    wanted = {name for library in npu for name in symbols(library, "--undefined-only")} - defined
    ignored = ("Py", "_Py", "__gmon", "__tls", "_ZTH", "_ITM")
    return sorted(
        name
        for name in wanted
        if not name.startswith(ignored) and not any(hasattr(lib, name) for lib in system)
    )


def stubs() -> str:
    """C source of a weak definition per symbol; the emulation's own definitions override it."""
    lines = [
        "long emu_harmless(const char*);",
        "long emu_unemulated(const char*);",
        "long emu_abort(const char*);",
    ]
    for name in undefined_symbols():
        if name.startswith(("_ZTI", "_ZTV", "_ZTS")):  # type information, not a function
            lines.append(f"__attribute__((weak)) void* {name}[64];")
            continue
        # GE's classes return objects, so there is no error to return.
        ge = name.startswith(("_ZN2ge", "_ZNK2ge"))
        ending = "abort" if ge else "harmless" if name.startswith(HARMLESS) else "unemulated"
        body = f'return emu_{ending}("{name}");'
        lines.append(f"__attribute__((weak)) long {name}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"


def fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted([Path(__file__), *SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]):
        digest.update(path.read_bytes())
    for package in ("torch", "torch_npu"):
        digest.update((SITE / package / "version.py").read_bytes())
    return digest.hexdigest()


def up_to_date() -> bool:
    stamp = LIB / "stamp"
    return stamp.exists() and stamp.read_text() == fingerprint()


def compile_and_link(out: Path) -> None:
    """Leaves the shared libraries, and the files they were made from, in `out`."""
    cc, cxx = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
    acl = f"-I{SITE}/torch_npu/include/third_party/acl/inc"
    torch = SITE / "torch"
    objects: list[Path] = []

    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], check=True)

    def compile_to_object(compiler: str, source: Path, *flags: str) -> None:
        objects.append(out / f"{source.stem}.o")
        run(compiler, "-c", "-fPIC", *flags, source, "-o", objects[-1])

    def link(name: str, *arguments: object) -> None:
        run(cxx, "-shared", "-fPIC", "-o", out / name, f"-Wl,-soname,{name}", *arguments)

    (out / "stubs.c").write_text(stubs())
    compile_to_object(cc, out / "stubs.c", "-w")
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "ge.cpp":  # CANN's GE is built with the old string ABI
            compile_to_object(cxx, source, "-std=c++17", "-w", "-D_GLIBCXX_USE_CXX11_ABI=0", acl)
        else:
            compile_to_object(cxx, source, "-O1", "-std=c++17", "-Wall", "-Wextra", acl)
    link("libascendcl.so", *objects)
    load_main = (f"-L{out}", "-l:libascendcl.so", "-Wl,-rpath,$ORIGIN")
    for name in LIBRARIES[1:]:
        link(f"lib{name}.so", "-Wl,--no-as-needed", *load_main)

    # ATen's headers take most of the time, so the files that need them are one translation unit.
    unit = out / "ops.cpp"
    unit.write_text("".join(f'#include "{path}"\n' for path in sorted(SOURCES.glob("ops/*.cpp"))))
    link(
        *("libopapi.so", "-O0", "-std=c++20", "-w", unit, acl),
        *(f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"),
        *(f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib", *load_main),
    )
    link("libnnopbase.so", "-Wl,--no-as-needed", "-l:libopapi.so", *load_main)


def build() -> None:
    LIB.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        compile_and_link(Path(scratch))
        # Replaced one by one: a process that has the old ones loaded keeps them.
        for library in Path(scratch).glob("*.so"):
            library.replace(LIB / library.name)
    (LIB / "stamp").write_text(fingerprint())


def main() -> None:
    if up_to_date():
        print("cann_emulator: up to date")
        return
    build()
    print(f"cann_emulator: built in {LIB}")


if __name__ == "__main__":
    main()
