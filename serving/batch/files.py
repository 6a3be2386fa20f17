"""The file that is to be answered, or stdin: found, opened, and complained about in this command's own words."""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from stages.common.errors import UserError, listing
from stages.common.schema.ingest import TableFormat
from stages.common.sources.cells import ascii_controls
from stages.common.sources.readers import format_of, read_rows
from stages.common.sources.streams import COMPRESSIONS, DAMAGED, is_damage, lines_of, open_decompressed

STDIN = "-"
# What the readers say about params.yaml, and what to say here.
_SAID_HERE = (
    (
        r"Correct ingest\.columns in params\.yaml \(.*?\)\.",
        'Name others with --column (one, or a pattern as "{title}: {text}") and --id-column.',
    ),
    (r", or take it out of its source's paths in params\.yaml", ""),
    (r"set its source's format in params\.yaml, for example \{.*?\}", "say it with --format"),
    (r"set its source's format\.encoding in params\.yaml to", "give --encoding"),
    (r"Set its source's format\.encoding to", "Give with --encoding"),
    (r"set format\.type to tsv", "give --format tsv"),
    (r"Check its name or `format`", "Check its name or --format"),
)


def name_of(file: str) -> str:
    """What ids and messages call a file."""
    return "stdin" if file == STDIN else ascii_controls(Path(file).name)


def format_name(file: str, given: str | None) -> str:
    """How a file is to be read: what --format says, else what its name says; stdin is lines of text.

    Args:
        file: its path, or "-".
        given: one of serving.batch.options.FORMATS, or None.

    Raises:
        UserError: the file is absent, or its name has no known ending.
    """
    if file != STDIN:
        _existing(file)
    if given is not None or file == STDIN:
        return given or "text"
    stem = file.lower()
    for suffix in COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    if stem.endswith(".txt"):
        return "text"
    with in_options():
        return format_of(Path(file).name).type


def read_table(file: str, form: str, encoding: str, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """The rows of a table as `read_rows` gives them.

    Args:
        file: its path, or "-". Stdin and pipes are put aside first: tables are not only read forwards.
        form: one of serving.batch.options.FORMATS but text.
        encoding: of its text; Parquet has its own.
        columns: those wanted.

    Raises:
        UserError: the file is absent, empty, damaged or not in its encoding, or lacks a column.
    """
    table_format = TableFormat(
        type=form,  # type: ignore[arg-type]
        column_names=None,
        quoting=True if form in ("csv", "tsv") else None,
        encoding=None if form == "parquet" else encoding,
    )
    with _on_disk(file) as path, in_options():
        yield from read_rows(path, name_of(file), table_format, columns)


def read_lines(file: str, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a file, or of stdin as they come, with their numbers; bytes that are no text become surrogates.

    Lines end in a line feed. A carriage return before it is left to whoever takes white space off; anywhere else it is
    a character of the text, as in what people copied out of forms: it must not make two rows of one.

    Raises:
        UserError: the file is absent or damaged, or its lines cannot be told apart in this encoding.
    """
    name = name_of(file)
    with _as_bytes(file) as stream, io.TextIOWrapper(stream, encoding, "surrogateescape", newline="\n") as lines:
        try:
            for number, line in enumerate(lines_of(lines, name), start=1):
                # A byte order mark is no part of the first text.
                yield number, line.removesuffix("\n").removeprefix("\ufeff" if number == 1 else "")
        except UnicodeError as error:
            raise UserError(f"{name}: is not {encoding} text ({error}). Give with --encoding the file's own.") from None
        except DAMAGED as error:
            if not is_damage(error):
                raise
            raise UserError(f"{name}: is damaged or incomplete ({error}). Fetch it again.") from None


@contextmanager
def in_options() -> Iterator[None]:
    """Messages of the readers, which name keys of params.yaml, name this command's options instead."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for words, here in _SAID_HERE:
            message = re.sub(words, here, message, flags=re.DOTALL)
        # The same error: of a damaged file others can be read.
        error.args = (message,)
        raise


@contextmanager
def _on_disk(file: str) -> Iterator[Path]:
    if file != STDIN and _existing(file).is_file():
        yield Path(file)
        return
    with tempfile.NamedTemporaryFile(prefix="predict-") as spool:
        with nullcontext(sys.stdin.buffer) if file == STDIN else Path(file).open("rb") as stream:
            shutil.copyfileobj(stream, spool, 1 << 20)
        spool.flush()
        yield Path(spool.name)


@contextmanager
def _as_bytes(file: str) -> Iterator[IO[bytes]]:
    if file == STDIN:
        yield sys.stdin.buffer
        return
    with open_decompressed(_existing(file), name_of(file)) as stream:
        yield stream


def _existing(file: str) -> Path:
    path = Path(file)
    if not path.exists():
        folder = path.parent
        there = sorted(other.name for other in folder.iterdir() if other.is_file()) if folder.is_dir() else []
        raise UserError(f"--file: {file} is not there. {folder} has {listing(there) or 'no file'}. Correct the path.")
    if path.is_dir():
        raise UserError(f"--file: {file} is a folder. Give one table or text file, or the folder with --folder.")
    if not (path.is_file() or path.is_fifo() or path.is_char_device()):
        raise UserError(f"--file: {file} is neither a file nor a pipe. Give one table or text file.")
    return path
