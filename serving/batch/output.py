"""Where the lines go: stdout, kept free of everything else, a file that is whole or absent, or a pipe."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stages.common.errors import UserError
from stages.common.tables import atomic_path

# While rows are answered, the names of file descriptor 1 lead to stderr.
STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def require_streams(reads_stdin: bool, output: str) -> None:
    """Give closed standard streams to the null device, where nothing is wanted of them.

    Left closed, their numbers would go to the next files opened, and into those would go what others print.

    Args:
        reads_stdin: whether the rows come from there.
        output: where the lines are to go.

    Raises:
        UserError: stdin or stdout is needed, and closed.
    """
    if reads_stdin and sys.stdin is None:
        raise UserError("--file: stdin is closed, so there is nothing to read. Pipe texts into it, or name a file.")
    if output in STDOUT and sys.stdout is None:
        raise UserError("--output: stdout is closed, so lines have no place to go. Name a file.")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            # Fetching the base is another process, with the same streams.
            os.set_inheritable(number, True)
            # As the streams themselves, it is never closed.
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def check_output(output: str) -> None:
    """Refuse an output that could not be written, before any row is answered in vain.

    Args:
        output: a path, or one of STDOUT.

    Raises:
        UserError: it is a folder or a device with blocks, or its folder takes no file of this name.
    """
    path = Path(output)
    if output in STDOUT or _is_stream(output):
        return
    if path.is_dir():
        raise UserError(f"--output: {output} is a folder. Name a file in it.")
    if path.exists() and not path.is_file():
        raise UserError(f"--output: {output} is neither a file nor a pipe. Name another one.")
    path = Path(os.path.realpath(path))
    try:
        # Only trying tells: permissions, a read-only disk, too long a name, a file where a folder has to be.
        with tempfile.NamedTemporaryFile(dir=next(filter(Path.exists, path.parents)), prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}). Name another file.") from None


@contextmanager
def stdout_for_answers() -> Iterator[IO[bytes]]:
    """Stdout itself, while what anything else prints there, child processes too, goes to stderr."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        # Unbuffered, so that closing it after its reader went away has nothing left to write.
        with open(own, "wb", buffering=0, closefd=False) as file:
            yield file
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)


@contextmanager
def open_output(output: str, stdout: IO[bytes]) -> Iterator[IO[bytes]]:
    """Where the lines go: stdout, a pipe or terminal as they come, or a file that appears when it is whole.

    Args:
        output: passed `check_output`.
        stdout: from `stdout_for_answers`.
    """
    if output in STDOUT:
        yield stdout
    elif _is_stream(output):
        # Replacing it, as a file is replaced, would leave its reader waiting and the machine without /dev/null.
        with Path(output).open("wb", buffering=0) as file:
            yield file
    else:
        # A symbolic link stays one: what it leads to is replaced.
        with atomic_path(os.path.realpath(output)) as path, path.open("wb") as file:
            yield file


def _is_stream(output: str) -> bool:
    return Path(output).is_fifo() or Path(output).is_char_device()


def write(file: IO[bytes], lines: list[dict[str, Any]]) -> None:
    """Write each as a line of JSON in UTF-8."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    while rest:
        rest = rest[file.write(rest) :]
