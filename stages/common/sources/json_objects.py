"""Objects out of JSON: one a line (JSON Lines), or all of them in one list, as many published data sets are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from stages.common.errors import UserError
from stages.common.sources.streams import lines_of

# Characters read at once from a list.
PIECE = 1 << 20
# A longer object is no row any more but a bracket or quote that was never closed.
MAX_OBJECT_CHARACTERS = 64 * 1024 * 1024
BLANKS = re.compile(r"[ \t\r\n]*")
DELIMITERS = frozenset(" \t\r\n,]")
# The number of the row (the line, or the place in the list), and the object; or what is wrong with it.
JsonRow = tuple[int, dict[str, Any] | str]


def json_objects(text: TextIO, name: str) -> Iterator[JsonRow]:
    """The objects of JSON Lines, or of one list of them, in memory bounded by the longest one.

    Args:
        text: read as a list when the first of its characters that is no white space is "[".
        name: the file, for messages.

    Yields:
        The row's number from 1 and the object, or a text that says why the row cannot be used. In JSON Lines the
        number is that of the line; in a list, which may be one line, that of the object.

    Raises:
        UserError: a list is broken: unlike after a broken line, nobody can say where its next object begins.
    """
    number = 1
    # A list may be one line of many gigabytes.
    while line := text.readline(PIECE):
        if line.strip():
            break
        number += line.endswith(("\n", "\r"))
    if line.lstrip().startswith("["):
        yield from _list_items(_Window(text, line, number), name)
        return
    rest = lines_of(text, name)
    if not line.endswith(("\n", "\r")):
        line += next(rest, "")
    yield from _lines(itertools.chain([line], rest), number)


def _lines(lines: Iterable[str], first: int) -> Iterator[JsonRow]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            yield number, _as_object(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield number, f"is no JSON ({str(error)[:100]})"


def _as_object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"is a JSON {type(value).__name__}, not an object"


def _list_items(window: _Window, name: str) -> Iterator[JsonRow]:
    window.next_character()
    window.step()
    if window.next_character() != "]":
        for number in itertools.count(1):
            window.next_character()
            line = window.line
            try:
                value = window.value()
            except (ValueError, RecursionError) as error:
                raise _broken(name, line, getattr(error, "msg", str(error))[:100]) from None
            yield number, _as_object(value)
            if window.next_character() != ",":
                break
            window.step()
    if window.next_character() != "]":
        raise _broken(name, window.line, "a comma or ] is missing")
    window.step()
    if window.next_character():
        raise _broken(name, window.line, "there is more behind its end")


def _broken(name: str, line: int, problem: str) -> UserError:
    return UserError(
        f"{name}: begins with [ but is no list of JSON objects: line {line:,}: {problem}. Correct it, fetch it again, "
        "or write one object on each line."
    )


class _Window:
    """A piece of a long text, and the place in it that was reached."""

    def __init__(self, text: TextIO, piece: str, line: int) -> None:
        self.line = line
        self._text, self._piece, self._at = text, piece, 0
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """Go to the next character that is no white space; empty at the end."""
        while True:
            blanks = BLANKS.match(self._piece, self._at)
            assert blanks is not None
            self._go_to(blanks.end())
            if self._at < len(self._piece) or not self._read():
                return self._piece[self._at : self._at + 1]

    def step(self) -> None:
        """Go over one character."""
        self._go_to(self._at + 1)

    def value(self) -> Any:
        """The JSON value that begins here; the place is behind it afterwards."""
        while True:
            problem: ValueError | None = None
            value, end = None, self._at
            try:
                value, end = self._decoder.raw_decode(self._piece, self._at)
            except ValueError as error:
                problem = error
            # A number at the piece's end may go on in the next one.
            whole = problem is None and (not isinstance(value, int | float) or self._piece[end : end + 1] in DELIMITERS)
            if whole or len(self._piece) - self._at > MAX_OBJECT_CHARACTERS or not self._read():
                break
        if problem is not None:
            raise problem
        self._go_to(end)
        return value

    def _go_to(self, place: int) -> None:
        self.line += self._piece.count("\n", self._at, place)
        self._at = place

    def _read(self) -> bool:
        """Read on, twice as much each time, so that a long object is not decoded once for each piece of it."""
        rest = self._piece[self._at :]
        more = self._text.read(max(PIECE, len(rest)))
        self._piece, self._at = rest + more, 0
        return bool(more)
