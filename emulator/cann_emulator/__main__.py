"""Python with emulated NPUs: `cann_emulator script.py args`, or `python -m cann_emulator ...`."""

import argparse
import code
import os
import runpy
import sys
from pathlib import Path

import torch

from . import standin, subprocesses


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="cann_emulator",
        usage="%(prog)s [--flash-attn-npu RELEASE] [script | -c code | -m module] [argument ...]",
        description="Runs a script, unchanged, on emulated Ascend NPUs; without one, a prompt.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--flash-attn-npu",
        choices=[*standin.RELEASES, "none"],
        default=standin.RELEASES[0],
        help="the release of flash_attn_npu that a stand-in plays (default: %(default)s)",
    )
    rest = argparse.REMAINDER
    made.add_argument("-c", dest="code", nargs=rest, help="runs code instead of a script")
    made.add_argument("-m", dest="module", nargs=rest, help="runs a module instead")
    made.add_argument("script", nargs=rest, help="a file, and its arguments")
    return made


def run(options: argparse.Namespace) -> None:
    """As python does: sys.argv, and the folder in which imports are sought first."""
    if options.script:
        sys.argv = options.script
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    sys.path.insert(0, os.getcwd())
    if options.module:
        sys.argv = options.module
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif options.code:
        text, *arguments = options.code
        sys.argv = ["-c", *arguments]
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        code.interact(banner="", local={"torch": torch}, exitmsg="")


def main() -> None:
    options = parser().parse_args()
    subprocesses.emulate()
    said = f"the npu is emulated ({torch.npu.device_count()} x {torch.npu.get_device_name(0)})"
    if options.flash_attn_npu != "none":
        standin.use(options.flash_attn_npu)
        said += f", flash_attn_npu {options.flash_attn_npu} is a stand-in"
    print(f"cann_emulator: {said}", file=sys.stderr)
    run(options)


if __name__ == "__main__":
    main()
