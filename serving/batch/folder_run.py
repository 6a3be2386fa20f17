"""Answer a folder of any size, part by part, by one process or many: what is whole stays, what is missing is done."""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from serving.batch.answering import answer, tell
from serving.batch.job import Job, Part, make_job, parts_of
from serving.batch.leading import conclude, lead
from serving.batch.manifest import MANIFEST, Entries, await_manifest, read_manifest
from serving.batch.parts import open_part
from serving.batch.piece import DamagedFileError
from serving.batch.pieces import Reader
from serving.batch.processes import Claims, Process, has_gpu, take_gpu, this_process
from serving.batch.rows import batches
from serving.common.notes import notes
from stages.common.base import BASE_FOLDER
from stages.common.errors import UserError, listing
from stages.common.progress import progress

if TYPE_CHECKING:
    from serving.predictor import Predictor

# Answered at a time, never beyond a part's end: most rows, and the characters behind which no further row is taken. A
# GPU wants several batches of 32,768 tokens; a CPU core took 3 to 8 % longer for 5,000 rows at a time than for 256.
AT_ONCE = {"cuda": (10_000, 8_000_000), "cpu": (256, 2_000_000)}
SECONDS_BETWEEN_LOOKS = 0.5


def run_folder(options: argparse.Namespace) -> None:
    """Answer what is not answered yet, and sum up.

    Args:
        options: checked.

    Raises:
        UserError: something cannot be used, another run is at work, or rows or files could not be answered.
    """
    process = this_process()
    job, passed = make_job(options)
    if process.leads and passed:
        tell(f"{len(passed):,} files of {options.folder} are no tables and are not read: {listing(passed)}")
    job.into.mkdir(parents=True, exist_ok=True)
    claims = Claims(job.into)
    if process.leads:
        entries = lead(job, claims, options.replace_changed)
    else:
        entries = await_manifest(job.into, job.run, job.files)
    parts = parts_of(job, entries)
    damaged = answer_parts(job, entries, parts, claims, process)
    if process.leads:
        conclude(job, entries, parts, damaged)


def answer_parts(job: Job, entries: Entries, parts: list[Part], claims: Claims, process: Process) -> dict[Part, str]:
    """Answer parts that no other process does, until none is left; the leading process waits for those of others.

    A process that ends loses its claims, so that the leading one, last of all, answers what others left behind.

    Returns:
        What could not be read, with the reason. Other processes leave that to the leading one, which tries it last.

    Raises:
        UserError: the output folder was begun anew by somebody else meanwhile.
    """
    begun = (job.into / MANIFEST).stat()
    if read_manifest(job.into) != (job.run, entries):
        raise UserError(begun_anew(job.into))
    reader, load = Reader(job.columns, job.encoding), loader(job, claims, process)
    damaged: dict[Part, str] = {}
    left, waits = parts, False
    rows = sum(part.piece.rows for part in parts)
    with progress(rows, "answering") as bar:
        bar.disable = bar.disable or not process.leads
        while left := [part for part in left if part not in damaged and not part.path.exists()]:
            # Others' rows too.
            bar.update(rows - sum(part.piece.rows for part in left) - bar.n)
            if waits and not process.leads:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS if waits else 0)
            waits = True
            for part in left:
                if claims.take(part.number):
                    waits = False
                    try:
                        require_unchanged(job.into, begun)
                        write_part(job, part, reader, load, bar.update)
                    except DamagedFileError as error:
                        damaged[part] = str(error)
                    finally:
                        claims.drop(part.number)
    return damaged


def loader(job: Job, claims: Claims, process: Process) -> Callable[[], Predictor]:
    """What loads the model on this process's GPU when there is something to answer, once."""

    @functools.cache
    def load() -> Predictor:
        from serving.predictor import load

        take_gpu(process)
        for note in notes(job.adapter, job.limit) if process.leads else ():
            tell(note)
        # A base that is absent is fetched by one process; the others find it.
        with nullcontext() if BASE_FOLDER.is_dir() else claims.base():
            return load(job.adapter, job.limit)

    return load


def require_unchanged(into: Path, begun: os.stat_result) -> None:
    """Refuse to go on by a manifest that is not the folder's any more.

    Raises:
        UserError: it was written again, or is gone.
    """
    try:
        now = (into / MANIFEST).stat()
    except FileNotFoundError:
        now = None
    if now is None or (now.st_ino, now.st_mtime_ns) != (begun.st_ino, begun.st_mtime_ns):
        raise UserError(begun_anew(into))


def begun_anew(into: Path) -> str:
    """What is said of an output folder that has another manifest now."""
    return f"{into}: was begun anew, or taken away, while this process was at work. Start the run again."


def write_part(
    job: Job, part: Part, reader: Reader, load: Callable[[], Predictor], advance: Callable[[int], object]
) -> None:
    """Answer the rows of a part: it is there afterwards, whole and on the disk.

    Raises:
        DamagedFileError: its file cannot be read there.
    """
    if part.path.exists():
        return  # finished by another process since this one looked
    name = part.file.name
    rows = (job.make(f"{name}:{number}", values) for number, values in reader.rows(part.file, part.piece))
    most_rows, most_characters = AT_ONCE["cuda" if has_gpu() else "cpu"]
    with open_part(part.path, job.adapter) as add:
        for batch in batches(rows, most_rows, most_characters):
            lines = answer(batch, load, advance)
            advance(sum("error" in line for line in lines))
            add(lines)
