"""The folder that is to be answered: which of its files are read, in which order, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, NoReturn

from stages.common.errors import UserError, listing
from stages.common.sources.cells import ascii_controls
from stages.common.sources.readers import TYPES
from stages.common.sources.streams import COMPRESSIONS

# Tables that --file reads; to pass over them would be to lose rows.
OTHER_TABLES = (*(suffix for suffix, form in TYPES.items() if form in ("csv", "tsv")), ".txt")


class InputFile(NamedTuple):
    """One of the folder's tables.

    Attributes:
        name: its path inside the folder, as ids and messages have it.
        path: where it lies.
        form: "parquet" or "jsonl".
    """

    name: str
    path: Path
    form: str


def find_files(folder: Path, form: str | None) -> tuple[list[InputFile], list[str]]:
    """The tables in a folder and the folders in it, sorted by their paths, and the names of what is passed over.

    Names that begin with a dot or an underscore are not looked at, as by Spark and Arrow: markers, checksums, logs.

    Args:
        folder: the input.
        form: of all files; None: their names say it.

    Raises:
        UserError: there is no such folder, it has no table, or one that is neither Parquet nor JSON Lines, or something
            in it that is not looked into.
    """
    if not folder.is_dir():
        raise UserError(f"--folder: {folder} is no folder. Correct the path; --file takes a single table.")
    paths = _walk(folder)
    found, passed, others = [], [], []
    for name in sorted(paths):
        kind = form or _form_of(name)
        if kind is not None:
            found.append(InputFile(ascii_controls(name), paths[name], kind))
        elif _stem(name).endswith(OTHER_TABLES):
            others.append(ascii_controls(name))
        else:
            passed.append(ascii_controls(name))
    if others:
        raise UserError(
            f"--folder: {folder} holds {listing(others)}. A folder's tables are Parquet or JSON Lines, which can be "
            "entered anywhere. Convert or move the others, or answer them one at a time with --file."
        )
    if not found:
        there = f"It has {listing(passed)}." if passed else "It is empty."
        raise UserError(
            f"--folder: {folder} has no Parquet or JSON Lines file (.parquet, .jsonl, .ndjson or .json). {there} "
            "--format says what files are whose names do not."
        )
    return found, passed


def _walk(folder: Path) -> dict[str, Path]:
    """All files in a folder and in its folders, by their names; whatever else there is could hold rows."""
    paths, unread = {}, []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for path in (Path(place, name) for name in (*folders, *files) if name[0] not in "._"):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                paths[name] = path
            elif path.is_symlink() or not path.is_dir():
                unread.append(ascii_controls(name))
    if unread:
        raise UserError(
            f"--folder: {folder} holds {listing(sorted(unread))}: links to folders, or names that lead to no file. "
            "They are not followed: put the files there, or a link to each of them, or take these names away."
        )
    return paths


def _raise(error: OSError) -> NoReturn:
    raise error


def _form_of(name: str) -> str | None:
    stem = _stem(name)
    form = next((form for suffix, form in TYPES.items() if stem.endswith(suffix)), None)
    return form if form in ("parquet", "jsonl") else None


def _stem(name: str) -> str:
    stem = name.lower()
    for suffix in COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    return stem
