"""`python -m cann_emulator [script args | -c code | -m module args]`: Python with emulated npus.

Without arguments it is interactive. Scripts run unchanged: torch.npu is there, fa3_ops too.
"""

import code
import importlib.util
import runpy
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[4]


def main() -> None:
    if importlib.util.find_spec("fa3_ops") is None:
        sys.path.append(str(REPOSITORY))
    devices = f"{torch.npu.device_count()} x {torch.npu.get_device_name(0)}"
    print(f"cann_emulator: the npu is emulated ({devices})", file=sys.stderr)
    arguments = sys.argv[1:]
    if not arguments:
        code.interact(banner="", local={"torch": torch}, exitmsg="")
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
