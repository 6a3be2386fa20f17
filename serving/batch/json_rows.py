"""JSON Lines read from any line on, and where their lines lie."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from serving.batch.piece import DamagedFileError, NumberedRow, Piece, damage
from stages.common.errors import UserError
from stages.common.sources.readers import require_columns
from stages.common.sources.streams import DAMAGED

BLOCK = 1 << 20
# A longer line is no row any more but a bracket or quote that was never closed.
MOST_LINE_BYTES = 64 * 1024 * 1024
FEWER_LINES = "it has fewer lines than when it was looked through"


class JsonRows:
    """JSON Lines from any byte on; those of a compressed file are read forwards as long as pieces come in order."""

    def __init__(self, stream: IO[bytes], name: str, columns: list[str], encoding: str) -> None:
        self._stream, self._name, self._columns, self._encoding = stream, name, columns, encoding
        self._place = 0

    def line_places(self, lines_per_piece: int) -> tuple[int, list[int]]:
        """How many lines there are, and where each piece starts; reads the file through.

        Raises:
            DamagedFileError: it cannot be decompressed.
            UserError: it is a list.
        """
        lines, starts, size, block = 0, [0], 0, b""
        for block in self._blocks():
            if not size:
                self._refuse_list(block)
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts += (size + 1 + ends[lines_per_piece - 1 - lines % lines_per_piece :: lines_per_piece]).tolist()
            lines, size = lines + len(ends), size + len(block)
        # The last line may have no end.
        lines += block[-1:] not in (b"", b"\n")
        return lines, starts[: -(-lines // lines_per_piece)]

    def require_columns(self, rows: int) -> None:
        """Look for the columns in the first rows; JSON Lines have no better place for their names.

        Raises:
            UserError: one is in none of them.
        """
        objects = [self._object(line) for _, line in self._lines(Piece(0, rows, 0))]
        found = dict.fromkeys(key for row in objects if isinstance(row, dict) for key in row)
        if found:
            require_columns(list(found), self._columns, self._name)

    def rows(self, piece: Piece) -> Iterator[NumberedRow]:
        """The rows of a piece with the numbers of their lines; empty lines are none.

        Raises:
            DamagedFileError: it cannot be decompressed, a line has no end, or it has fewer lines than it had.
        """
        for number, line in self._lines(piece):
            row = self._object(line)
            if row is not None:
                yield number, row if isinstance(row, str) else [row.get(column) for column in self._columns]

    def _lines(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        number = piece.first
        try:
            self._go_to(piece.start)
            for number in range(piece.first + 1, piece.first + 1 + piece.rows):
                line = self._stream.readline(MOST_LINE_BYTES)
                if not line:
                    raise EOFError(FEWER_LINES)
                self._place += len(line)
                if len(line) == MOST_LINE_BYTES:
                    raise DamagedFileError(
                        f"{self._name}: line {number:,} has {MOST_LINE_BYTES:,} bytes or more, so it is no row of JSON "
                        "Lines. Write one object on each line."
                    )
                # A byte order mark is no part of the first row.
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
        except DAMAGED as error:
            raise damage(error, self._name, f"line {number:,}") from None

    def _object(self, line: bytes) -> dict[str, Any] | str | None:
        """The object on a line, what is wrong with it, or None where the line is empty."""
        try:
            text = line.decode(self._encoding)
            value = json.loads(text) if text.strip() else None
        except UnicodeError:
            return f"is not {self._encoding} text; --encoding names another encoding"
        except (ValueError, RecursionError) as error:
            return f"is no JSON ({str(error)[:100]})"
        if not text.strip() or isinstance(value, dict):
            return value
        return f"is a JSON {type(value).__name__}, not an object"

    def _blocks(self) -> Iterator[bytes]:
        try:
            while block := self._stream.read(BLOCK):
                yield block
        except DAMAGED as error:
            raise damage(error, self._name, "its beginning") from None

    def _refuse_list(self, block: bytes) -> None:
        if block.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise UserError(
                f"{self._name}: is one JSON list, which can be entered at its beginning alone. Write one object on "
                "each line (`jq -c '.[]'`), or answer it with --file."
            )

    def _go_to(self, start: int) -> None:
        if self._stream.seekable():
            self._stream.seek(start)
        else:
            # Zstandard's stream only goes forward, and `Reader` opens it again for what lies behind it.
            while self._place < start:
                block = self._stream.read(min(BLOCK, start - self._place))
                if not block:
                    raise EOFError(FEWER_LINES)
                self._place += len(block)
        self._place = start

    def can_reach(self, piece: Piece) -> bool:
        """Whether a piece does not lie behind what only goes forward."""
        return self._stream.seekable() or piece.start >= self._place
