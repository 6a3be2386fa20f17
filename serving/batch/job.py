"""What is to be done with a folder: the parts of its output, and what decides them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from serving.batch.folder import InputFile, find_files
from serving.batch.manifest import LAYOUT, Entries, adapter_sha256
from serving.batch.options import ROWS_PER_PART, check_kind, encoding_name
from serving.batch.piece import Piece
from serving.batch.pieces import Survey, cut, survey
from serving.batch.rows import Columns, Row, row_maker
from serving.common.adapter import ADAPTER, Adapter, read_adapter
from serving.common.notes import answer_limit
from stages.common.errors import UserError

MOST_NUMBERED = 1_000_000


class Part(NamedTuple):
    """A piece of the input and where its answers go.

    Attributes:
        file: where it lies.
        piece: which rows of it.
        path: the answers; the part is done when it exists.
        number: what it is claimed by; numbers of different parts differ.
    """

    file: InputFile
    piece: Piece
    path: Path
    number: int


class Job(NamedTuple):
    """What the processes of a run have in common.

    Attributes:
        adapter: that answers.
        limit: longest answer in tokens.
        into: the output folder.
        files: the input, in order.
        run: what decides answers and parts, for the manifest.
        columns: those that are read.
        make: what makes rows of their values.
        look: what looks through a file.
        encoding: of JSON Lines.
    """

    adapter: Adapter
    limit: int
    into: Path
    files: list[InputFile]
    run: dict[str, Any]
    columns: list[str]
    make: Callable[[str, Any], Row]
    look: Callable[[InputFile], Survey]
    encoding: str


def make_job(options: argparse.Namespace) -> tuple[Job, list[str]]:
    """What the command line asks for, and the names of files that are passed over.

    Raises:
        UserError: adapter, folder or an option cannot be used.
    """
    adapter = read_adapter(Path(options.adapter or ADAPTER), options.decision and Path(options.decision))
    check_kind(options, adapter)
    files, passed = find_files(Path(options.folder), options.format)
    # A byte order mark is taken off anyway.
    encoding = encoding_name(options.encoding or "utf-8").removesuffix("-sig")
    columns = Columns(
        "text" if options.column is None else options.column, options.id_column, options.conversations, adapter.kind
    )
    needed, make = row_maker(columns)
    limit, rows_per_part = answer_limit(options.max_new_tokens, adapter), options.rows_per_part or ROWS_PER_PART
    all_parquet = all(file.form == "parquet" for file in files)
    run = {
        "layout": LAYOUT,
        "adapter": adapter_sha256(adapter),
        "decision": adapter.rule,
        "max_new_tokens": limit if adapter.answers_with_texts else None,
        "column": columns.text,
        "id_column": columns.id,
        "conversations": columns.turns,
        "encoding": encoding,
        "format": options.format,
        "rows_per_part": rows_per_part,
        "output_format": options.output_format or ("parquet" if all_parquet else "jsonl"),
    }

    def look(file: InputFile) -> Survey:
        return survey(file, rows_per_part, needed, encoding)

    return Job(adapter, limit, Path(options.output_folder), files, run, needed, make, look, encoding), passed


def part_stem(file_number: int) -> str:
    """How the names of a file's parts begin: sorted by name they are in the order of the input."""
    return f"part-{file_number:06d}-"


def parts_of(job: Job, entries: Entries) -> list[Part]:
    """The parts of the whole output, in order.

    Raises:
        UserError: there are too many.
    """
    parts = []
    for number, file in enumerate(job.files):
        pieces = cut(entries[file.name].survey, job.run["rows_per_part"])
        if number >= MOST_NUMBERED or len(pieces) > MOST_NUMBERED:
            raise UserError(
                f"--folder: more than {MOST_NUMBERED:,} files, or parts of one file. Raise --rows-per-part."
            )
        for index, piece in enumerate(pieces):
            path = job.into / f"{part_stem(number)}{index:06d}.{job.run['output_format']}"
            parts.append(Part(file, piece, path, number * MOST_NUMBERED + index))
    return parts
