"""Where the lines go: stdout, kept free of everything else, or a file that is whole or absent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from stages.common.tables import atomic_path

STDOUT = "-"


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
    """Where the lines go: stdout, or a file that appears when it is whole."""
    if output == STDOUT:
        yield stdout
        return
    with atomic_path(output) as path, path.open("wb") as file:
        yield file


def write(file: IO[bytes], lines: list[dict[str, Any]]) -> None:
    """Write each as a line of JSON in UTF-8."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    while rest:
        rest = rest[file.write(rest) :]
