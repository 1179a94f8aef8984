"""The report: Markdown, printed line by line, and what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Report:
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def write(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def section(self, title: str) -> None:
        self.write("", f"## {title}", "")

    def say(self, name: str, what: object) -> None:
        self.write(f"- {name}: {what}")

    def fail(self, name: str, what: object) -> None:
        self.failures.append(name)
        self.say(name, f"FAILED: {what}")

    def attempt(self, name: str, check: Callable[..., object], *arguments: object) -> None:
        """Reports what check(*arguments) returns, if anything, or the exception that it raised."""
        try:
            found = check(*arguments)
        except Exception as error:
            self.fail(name, first_line(error))
            return
        if found is not None:
            self.say(name, found)

    def judged(self, title: str, number: int, wrong: dict[str, str], remark: str = "") -> None:
        """One line for all of a number of calls, one more for each that is wrong."""
        self.say(title, f"{number - len(wrong)} of {number} right{remark}")
        for name, what in wrong.items():
            self.fail(f"{title}, {name}", what)


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_line(error: Exception) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))
