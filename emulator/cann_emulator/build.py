"""Builds the emulated CANN libraries for the torch and torch_npu of the running Python.

The first `import cann_emulator` does it, or `python -m cann_emulator.build`, into a folder of the
user's cache that is named after the versions and the sources.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"


class BuildError(ImportError):
    """Why there is no emulated CANN."""


def package(name: str) -> Path:
    """Where a package lies, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"cann_emulator needs torch and torch_npu: {name} is not installed")
    return Path(spec.origin).parent


TORCH, TORCH_NPU = package("torch"), package("torch_npu")


def fingerprint() -> str:
    """Of what the libraries are made from."""
    digest = hashlib.sha256()
    sources = [Path(__file__), *SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]
    for path in [*sorted(sources), TORCH / "version.py", TORCH_NPU / "version.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cann_emulator"
VERSIONS = " and ".join(f"{name} {version(name)}" for name in ("torch", "torch_npu"))
LIB = CACHE / f"{VERSIONS.replace(' and ', '-').replace(' ', '-')}-{fingerprint()[:12]}"

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


def run(*command: object) -> str:
    """What a command prints. Its warnings are shown, its errors are why there is no emulator."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(
            f"cann_emulator cannot run {words[0]} ({error.strerror}). It builds its libraries with"
            " a C and a C++ compiler, which CC and CXX may name, and with nm of binutils"
        ) from None
    if done.returncode:
        raise BuildError(
            f"cann_emulator does not build beside {VERSIONS}.\n$ {shlex.join(words)}\n{done.stderr}"
        )
    sys.stderr.write(done.stderr)
    return done.stdout


def symbols(library: Path, which: str) -> set[str]:
    listing = run("nm", "-D", which, library)
    return {line.split()[-1].split("@")[0] for line in listing.splitlines() if line.split()}


def undefined_symbols() -> list[str]:
    """What torch_npu takes from CANN: what nothing else in the process defines."""
    npu = sorted(TORCH_NPU.rglob("*.so"))
    defined = set()
    for library in [*npu, *(TORCH / "lib").glob("*.so*")]:
        defined |= symbols(library, "--defined-only")
    # None is the process itself, which has the C library.
    system = [ctypes.CDLL(name) for name in (None, "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")]
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


def compile_and_link(lib: Path, scratch: Path) -> None:
    """Leaves the shared libraries in `lib`, and the files they were made from in `scratch`."""
    cc, cxx = (
        shlex.split(os.environ.get(name, usual)) for name, usual in (("CC", "cc"), ("CXX", "c++"))
    )
    acl = f"-I{TORCH_NPU}/include/third_party/acl/inc"
    objects: list[Path] = []

    def compile_to_object(compiler: list[str], source: Path, *flags: str) -> None:
        objects.append(scratch / f"{source.stem}.o")
        run(*compiler, "-c", "-fPIC", *flags, source, "-o", objects[-1])

    def link(name: str, *arguments: object) -> None:
        run(*cxx, "-shared", "-fPIC", "-o", lib / name, f"-Wl,-soname,{name}", *arguments)

    (scratch / "stubs.c").write_text(stubs())
    compile_to_object(cc, scratch / "stubs.c", "-w")
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "ge.cpp":  # CANN's GE is built with the old string ABI
            compile_to_object(cxx, source, "-std=c++17", "-w", "-D_GLIBCXX_USE_CXX11_ABI=0", acl)
        else:
            compile_to_object(cxx, source, "-O1", "-std=c++17", "-Wall", "-Wextra", acl)
    link("libascendcl.so", *objects)
    load_main = (f"-L{lib}", "-l:libascendcl.so", "-Wl,-rpath,$ORIGIN")
    for name in LIBRARIES[1:]:
        link(f"lib{name}.so", "-Wl,--no-as-needed", *load_main)

    # ATen's headers take most of the time, so the files that need them are one translation unit.
    unit = scratch / "ops.cpp"
    unit.write_text("".join(f'#include "{path}"\n' for path in sorted(SOURCES.glob("ops/*.cpp"))))
    link(
        *("libopapi.so", "-O0", "-std=c++20", "-w", unit, acl),
        *(f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"),
        *(f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", *load_main),
    )
    link("libnnopbase.so", "-Wl,--no-as-needed", "-l:libopapi.so", *load_main)


def up_to_date() -> bool:
    return LIB.is_dir()


def build() -> None:
    """Leaves all libraries in LIB, or none. Of processes that begin together one builds."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if up_to_date():
                return
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                lib = Path(scratch) / "lib"
                lib.mkdir()
                compile_and_link(lib, Path(scratch))
                lib.rename(LIB)
    except OSError as error:
        raise BuildError(
            f"cann_emulator cannot write its libraries ({error}). XDG_CACHE_HOME, now"
            f" {CACHE.parent}, may name another folder"
        ) from None


def ensure() -> None:
    if not up_to_date():
        print(f"cann_emulator: building for {VERSIONS}, half a minute, once", file=sys.stderr)
        build()


def main() -> None:
    if up_to_date():
        print("cann_emulator: up to date")
        return
    try:
        build()
    except BuildError as error:
        raise SystemExit(str(error)) from None
    print(f"cann_emulator: built in {LIB}")


if __name__ == "__main__":
    main()
