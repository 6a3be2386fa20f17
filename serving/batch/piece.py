"""A piece of an input file, and a file that cannot be read on."""

from __future__ import annotations

from typing import Any, NamedTuple

from stages.common.errors import UserError
from stages.common.sources.streams import is_damage

# A row's number from 1, or that of its line, and its values; or a text that says why it cannot be used.
NumberedRow = tuple[int, list[Any] | str]


class DamagedFileError(UserError):
    """A file that cannot be read on; others can."""


class Piece(NamedTuple):
    """Rows of an input file that follow each other.

    Attributes:
        first: number of its first row, or line, from 0.
        rows: how many there are.
        start: the byte of JSON Lines at which it starts, after decompression.
    """

    first: int
    rows: int
    start: int


def damage(error: BaseException, name: str, place: str) -> BaseException:
    """An error of reading as this command words it; what the operating system reports stays as it is."""
    if not is_damage(error):
        return error
    problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return DamagedFileError(f"{name}: is damaged or incomplete after {place} ({problem}). Fetch it again.")
