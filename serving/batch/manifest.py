"""What an output folder was begun with: its input file by file, the adapter, the options. Answers of two never mix."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from serving.batch.folder import InputFile
from serving.batch.parts import write_durable_json
from serving.batch.pieces import Survey
from stages.common.base import file_sha256
from stages.common.errors import UserError, listing

MANIFEST = "manifest.json"
SUMMARY = "summary.json"
# Raised when parts would be cut or batched differently from the same options.
LAYOUT = 1
SECONDS_BETWEEN_LOOKS = 0.2

Look = Callable[[InputFile], Survey]


class Entry(NamedTuple):
    """What the manifest holds of a file.

    Attributes:
        bytes: its size.
        modified_ns: when it was last written to. As long as both are the same it is not read to see whether it changed.
        survey: what reading it through has told.
    """

    bytes: int
    modified_ns: int
    survey: Survey

    def looks_like(self, file: InputFile) -> bool:
        """Whether size and time are still the same."""
        status = file.path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.bytes, self.modified_ns)


Entries = dict[str, Entry]


def read_manifest(folder: Path) -> tuple[dict[str, Any], Entries] | None:
    """The run's settings and the input's files; None where nothing was begun.

    Raises:
        UserError: it is damaged, or of another version of this command.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entries = {
            name: Entry(entry["bytes"], entry["modified_ns"], Survey(entry["sha256"], entry["rows"], entry["starts"]))
            for name, entry in values["files"].items()
        }
        return dict(values["run"]), entries
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is no manifest of this command, so nobody can say what {folder} holds. Name another "
            "--output-folder."
        ) from None


def begin(folder: Path, run: dict[str, Any], files: list[InputFile], look: Look) -> Entries:
    """Look through all files and write the manifest: from then on the folder belongs to this input.

    Raises:
        UserError: the folder holds something else, a file cannot be used, or there are no rows.
    """
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found:
        raise UserError(
            f"--output-folder: {folder} holds {listing(found)}, but no {MANIFEST}, so this command did not begin it. "
            "Name a new or empty folder."
        )
    entries = {file.name: surveyed(file, look) for file in files}
    if not any(entry.survey.rows for entry in entries.values()):
        raise UserError("--folder: its files hold no rows, so there is nothing to answer.")
    write_manifest(folder, run, entries)
    return entries


def surveyed(file: InputFile, look: Look) -> Entry:
    """A file's entry.

    Raises:
        UserError: it cannot be used, or was written to meanwhile.
    """
    status = file.path.stat()
    entry = Entry(status.st_size, status.st_mtime_ns, look(file))
    if not entry.looks_like(file):
        raise UserError(f"{file.name}: is being written to. Run again when it is whole.")
    return entry


def write_manifest(folder: Path, run: dict[str, Any], entries: Entries) -> None:
    """Write it, whole or not at all."""
    files = {
        name: {"bytes": entry.bytes, "modified_ns": entry.modified_ns, **entry.survey._asdict()}
        for name, entry in entries.items()
    }
    write_durable_json(folder / MANIFEST, {"run": run, "files": files})


def require_same_run(folder: Path, begun: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        UserError: says which differ.
    """
    differing = [name for name in {**begun, **run} if begun.get(name) != run.get(name)]
    if differing:
        said = "\n  ".join(f"{name}: {_short(begun.get(name))} then, {_short(run.get(name))} now" for name in differing)
        raise UserError(
            f"{folder}: was begun otherwise, and answers of two kinds must not mix:\n  {said}\nGive the same again, or "
            "name another --output-folder."
        )


def require_same_files(folder: Path, entries: Entries, files: list[InputFile]) -> None:
    """Refuse to go on with other files; what they hold is not looked at.

    Raises:
        UserError: says which are new and which are gone.
    """
    names = {file.name for file in files}
    new, gone = sorted(names - entries.keys()), sorted(entries.keys() - names)
    if new or gone:
        said = [f"{listing(group)} {verb}" for group, verb in ((new, "came"), (gone, "went")) if group]
        raise UserError(
            f"{folder}: was begun with other files: {' and '.join(said)} since. Parts are numbered by files, so they "
            "have to stay the same. Restore them, or name another --output-folder (for new files alone: a folder with "
            "those as --folder)."
        )


def changed_files(entries: Entries, files: list[InputFile]) -> list[InputFile]:
    """The files whose content is another one; those that only look so are read to tell."""
    return [
        file
        for file in files
        if not entries[file.name].looks_like(file)
        and (file.path.stat().st_size, file_sha256(file.path))
        != (entries[file.name].bytes, entries[file.name].survey.sha256)
    ]


def await_manifest(folder: Path, run: dict[str, Any], files: list[InputFile]) -> Entries:
    """What the leading process of this launch has written, or accepted, once it fits.

    Where it does not, that process says why and ends, and the launcher ends this one.

    Raises:
        UserError: the launcher has ended.
    """
    launcher = os.getppid()
    while True:
        found = read_manifest(folder)
        if found is not None and found[0] == run and found[1].keys() == {file.name for file in files}:
            entries = found[1]
            if all(entries[file.name].looks_like(file) for file in files):
                return entries
        if os.getppid() != launcher:
            raise UserError("the launcher has ended, so this process does too.")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
