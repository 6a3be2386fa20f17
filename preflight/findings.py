"""What a check reports, and running a table of checks on the values that there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Finding(NamedTuple):
    """Something that a check found.

    Attributes:
        level: "error": the run would be wasted or wrong; "warning": the user should know, and may want it so.
        key: of params.yaml, or the file, where it can be mended.
        found: what is.
        wanted: what is allowed, or usual.
        remedy: what to do.
    """

    level: Literal["error", "warning"]
    key: str
    found: str
    wanted: str
    remedy: str

    def __str__(self) -> str:
        """One line for the terminal."""
        return f"{self.key}: {self.found}. Wanted: {self.wanted}. {self.remedy}."


# A check's parameters name the values that it needs; it yields what it finds.
Check = Callable[..., Iterator[Finding]]


def error(key: str, found: str, wanted: str, remedy: str) -> Finding:
    """A finding that stops the run; see `Finding`."""
    return Finding("error", key, found, wanted, remedy)


def warning(key: str, found: str, wanted: str, remedy: str) -> Finding:
    """A finding that is printed; see `Finding`."""
    return Finding("warning", key, found, wanted, remedy)


def run_checks(checks: Sequence[Check], values: Mapping[str, Any]) -> tuple[list[Finding], list[str]]:
    """Run every check whose values are there.

    Args:
        checks: functions; their names are shown, so they say what is wrong.
        values: by the name that checks' parameters have.

    Returns:
        What was found, in the order of the checks; and the names, in words, of the checks that lack a value.
    """
    findings: list[Finding] = []
    waiting: list[str] = []
    for check in checks:
        needed = inspect.signature(check).parameters
        if needed.keys() <= values.keys():
            findings += check(**{name: values[name] for name in needed})
        else:
            waiting.append(check.__name__.replace("_", " "))
    return findings, waiting
