"""The command line of `python -m serving.predict`, and what of it contradicts itself or the adapter."""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.common.adapter import Adapter

FORMATS = ("text", "csv", "tsv", "jsonl", "parquet")
EXAMPLES = """
examples:
  python -m serving.predict --text "what a day" --text "never again"
  python -m serving.predict --file papers.csv --column "{title}\\n{abstract}" --id-column pmid --output answers.jsonl
  cut -f3 tweets.tsv | python -m serving.predict --file - | jq -r .label

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
    parser.add_argument(
        "--column", help='of --file: the column with the texts, or a pattern over columns (default "text")'
    )
    parser.add_argument("--id-column", metavar="COLUMN", help="of --file: the rows' ids (default: FILE:LINE)")
    parser.add_argument(
        "--conversations",
        choices=("messages", "sharegpt"),
        help="of --file: --column holds conversations, as role and content (messages) or from and value (sharegpt)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of --file (default: its name says it; stdin: text, which is one text a line)",
    )
    parser.add_argument("--encoding", help="of --file (default utf-8)")
    parser.add_argument("--output", metavar="FILE", default="-", help="where lines go, whole or not at all; -: stdout")
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


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        UserError: names the option.
    """
    _refuse_empty(options)
    of_tables = {"--column": options.column, "--id-column": options.id_column, "--conversations": options.conversations}
    of_files = of_tables | {"--format": options.format, "--encoding": options.encoding}
    for name, value in of_files.items():
        if options.text is not None and value is not None:
            raise UserError(f"{name}: is about --file, and texts are given by --text. Leave one of them out.")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {options.max_new_tokens} is no length of an answer. Give 1 or more.")
    if options.encoding is not None:
        encoding_name(options.encoding)
    paths = {"--file": options.file, "--output": options.output}
    there = [Path(name) for option, name in paths.items() if name not in (None, "-") and _exists(Path(name), option)]
    if len(there) == 2 and there[0].samefile(there[1]):
        raise UserError(f"--output: {options.output} is the file to be read. Name another one.")


def _refuse_empty(options: argparse.Namespace) -> None:
    # As of a shell's variable that is not set. An empty --text is a row, and what is said of that is said of it.
    for name in ("file", "column", "id_column", "encoding", "output", "adapter", "decision"):
        if getattr(options, name) == "":
            raise UserError(f"--{name.replace('_', '-')}: is empty. Give it a value, or leave it out.")


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


def check_kind(options: argparse.Namespace, adapter: Adapter) -> None:
    """Refuse options that mean nothing with this adapter's kind of task.

    Raises:
        UserError: names the option.
    """
    for name, value in (("--max-new-tokens", options.max_new_tokens), ("--conversations", options.conversations)):
        if value is not None and not adapter.answers_with_texts:
            raise UserError(f"{name}: {adapter.folder} answers with labels ({adapter.kind}). Leave it out.")
    if options.decision is not None and adapter.answers_with_texts:
        raise UserError(f"--decision: {adapter.folder} answers with texts, which no threshold decides. Leave it out.")


def answer_limit(options: argparse.Namespace, adapter: Adapter) -> int:
    """The longest answer in tokens: as asked for, else as the pipeline's own predictions were made.

    Raises:
        UserError: params.yaml is there, but not usable.
    """
    from serving.common.adapter import is_ours
    from serving.predictor import MAX_NEW_TOKENS
    from stages.common.params import PARAMS_PATH, load_params

    if options.max_new_tokens is not None:
        return int(options.max_new_tokens)
    if adapter.answers_with_texts and is_ours(adapter.folder) and PARAMS_PATH.is_file():
        return load_params("infer").infer.max_new_tokens or MAX_NEW_TOKENS
    return MAX_NEW_TOKENS
