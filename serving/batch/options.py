"""The command line of `python -m serving.predict`, and what of it contradicts itself or the adapter."""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from serving.common.options import refuse_decision, refuse_empty
from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.common.adapter import Adapter

FORMATS = ("text", "csv", "tsv", "jsonl", "parquet")
FOLDER_FORMATS = ("jsonl", "parquet")
ROWS_PER_PART = 10_000
MOST_ROWS_PER_PART = 1_000_000
EXAMPLES = """
examples:
  python -m serving.predict --text "what a day" --text "never again"
  python -m serving.predict --file papers.csv --column "{title}\\n{abstract}" --id-column pmid --output answers.jsonl
  cut -f3 tweets.tsv | python -m serving.predict --file - | jq -r .label
  accelerate launch --num_processes 8 -m serving.predict --folder papers --output-folder answers

Each row of the input gives one line, in order: "id" and what was answered; "shortened": true where the text was too
long; "error" in place of an answer where there was nothing to answer, and then the exit code is 1. docs/predict.md has
all of it.
"""


def arguments(description: str | None) -> argparse.Namespace:
    """What the command line says.

    Args:
        description: what the command does, for its help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving.predict",
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="a text, question or user's turn; may be repeated")
    source.add_argument(
        "--file", help="CSV, TSV, JSON Lines, Parquet or .txt, compressed or not; -: stdin, a text a line"
    )
    source.add_argument(
        "--folder", metavar="FOLDER", help="all Parquet and JSON Lines in it; a run that was ended goes on where it was"
    )
    parser.add_argument(
        "--column", help='of --file or --folder: the column with the texts, or a pattern over columns (default "text")'
    )
    parser.add_argument("--id-column", metavar="COLUMN", help="of either: the rows' ids (default: FILE:LINE)")
    parser.add_argument(
        "--conversations",
        choices=("messages", "sharegpt"),
        help="of either: --column holds conversations, as role and content (messages) or from and value (sharegpt)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of either (default: names say it; stdin: text, which is one text a line)",
    )
    parser.add_argument("--encoding", help="of either (default utf-8)")
    parser.add_argument("--output", metavar="FILE", default="-", help="where lines go, whole or not at all; -: stdout")
    _add_folder_arguments(parser)
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter (default models/adapter)")
    parser.add_argument(
        "--decision", metavar="FILE", help="its thresholds (default: models/decision.json, for models/adapter alone)"
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help="longest answer where answers are texts (default: infer.max_new_tokens of params.yaml, or 256)",
    )
    return parser.parse_args()


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-folder", metavar="FOLDER", help="of --folder: where its answers go, part by part")
    parser.add_argument(
        "--output-format",
        choices=FOLDER_FORMATS,
        help="of --folder: what the parts are (default: parquet where all input is, else jsonl)",
    )
    parser.add_argument(
        "--rows-per-part",
        metavar="N",
        type=int,
        help=f"of --folder: most rows in a part, and what a killed process has to do again (default {ROWS_PER_PART:,})",
    )
    parser.add_argument(
        "--replace-changed",
        action="store_true",
        help="of --folder: answer files anew that have changed since the output folder was begun",
    )


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        UserError: names the option.
    """
    _refuse_empty(options)
    _check_folder_arguments(options)
    of_tables = {"--column": options.column, "--id-column": options.id_column, "--conversations": options.conversations}
    of_files = of_tables | {"--format": options.format, "--encoding": options.encoding}
    for name, value in of_files.items():
        if options.text is not None and value is not None:
            raise UserError(
                f"{name}: is about --file and --folder, and texts are given by --text. Leave one of them out."
            )
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {options.max_new_tokens} is no length of an answer. Give 1 or more.")
    if options.encoding is not None:
        encoding_name(options.encoding)
    paths = {"--file": options.file, "--output": options.output}
    there = [Path(name) for option, name in paths.items() if name not in (None, "-") and _exists(Path(name), option)]
    if len(there) == 2 and there[0].samefile(there[1]):
        raise UserError(f"--output: {options.output} is the file to be read. Name another one.")


def _check_folder_arguments(options: argparse.Namespace) -> None:
    if options.folder is None:
        for name in ("output_folder", "output_format", "rows_per_part", "replace_changed"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: is about --folder, which is not given. Leave it out.")
        return
    if options.output_folder is None:
        raise UserError("--folder: its answers need a folder of their own. Name one with --output-folder.")
    if options.output != "-":
        raise UserError("--output: of a folder the answers go into --output-folder. Leave it out.")
    if options.format not in (None, *FOLDER_FORMATS):
        raise UserError(f"--format: {options.format}: a folder's tables are {' or '.join(FOLDER_FORMATS)}.")
    if options.rows_per_part is not None and not 1 <= options.rows_per_part <= MOST_ROWS_PER_PART:
        raise UserError(f"--rows-per-part: {options.rows_per_part:,} is none. Give 1 to {MOST_ROWS_PER_PART:,}.")
    if "\n".encode(folder_encoding(options.encoding)) != b"\n":
        raise UserError(
            f"--encoding: in {options.encoding} lines cannot be found by their bytes, as a folder's have to be. Save "
            "the files as UTF-8."
        )
    into, out_of = Path(options.output_folder).resolve(), Path(options.folder).resolve()
    if into.is_relative_to(out_of):
        raise UserError(
            f"--output-folder: {options.output_folder} lies in {options.folder}, where it would be read as input. Name "
            "one outside."
        )


def _refuse_empty(options: argparse.Namespace) -> None:
    # As of a shell's variable that is not set. An empty --text is a row, and what is said of that is said of it.
    of_paths = ("file", "folder", "output", "output_folder", "adapter", "decision")
    refuse_empty(options, (*of_paths, "column", "id_column", "encoding"))


def _exists(path: Path, option: str) -> bool:
    try:
        return path.exists()
    except OSError as error:
        # Most often a text in place of a name, and too long for one.
        raise UserError(f"{option}: {str(path)[:80]!r} cannot be looked at ({error.strerror}). Give a path.") from None


def encoding_name(given: str) -> str:
    """The one name of an encoding that has several: "utf-8" for "UTF8".

    Raises:
        UserError: there is none of that name, or it is none of texts, as hex and zlib are not.
    """
    try:
        # Alone of all that takes a name, this also says whether it stands for an encoding of texts.
        "".encode(given)
        return codecs.lookup(given).name
    except (LookupError, UnicodeError):
        raise UserError(
            f"--encoding: {given!r} is unknown, or no encoding of texts; utf-8, utf-16, cp1252 and the others in "
            "https://docs.python.org/3/library/codecs.html#standard-encodings are known."
        ) from None


def folder_encoding(given: str | None) -> str:
    """The encoding of a folder's JSON Lines, of which a byte order mark is taken off anyway."""
    return encoding_name(given or "utf-8").removesuffix("-sig")


def check_kind(options: argparse.Namespace, adapter: Adapter) -> None:
    """Refuse options that mean nothing with this adapter's kind of task.

    Raises:
        UserError: names the option.
    """
    for name, value in (("--max-new-tokens", options.max_new_tokens), ("--conversations", options.conversations)):
        if value is not None and not adapter.answers_with_texts:
            raise UserError(f"{name}: {adapter.folder} answers with labels ({adapter.kind}). Leave it out.")
    refuse_decision(options, adapter)
