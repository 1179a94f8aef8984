"""`python -m fa3_ops`: versions, devices, backends, and two commands."""

from __future__ import annotations

import argparse
import sys

from fa3_ops.tools import consistency, doctor
from fa3_ops.tools.info import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fa3_ops",
        description="Without a command: what this machine has (versions, devices, backends).",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module, what in (
        (consistency, "run the bitwise contract on a device"),
        (doctor, "check versions, results and bits; prints one report to paste into an issue"),
    ):
        command = commands.add_parser(module.__name__.removeprefix("fa3_ops.tools."), help=what)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        print(report())
        return 0
    status: int = chosen.run(chosen)
    return status


if __name__ == "__main__":
    sys.exit(main())
