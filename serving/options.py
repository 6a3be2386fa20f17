"""The command line of `python -m serving.predict`, and what of it contradicts itself or the adapter."""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.adapter import Adapter

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
        choices=("text", "csv", "tsv", "jsonl", "parquet"),
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
    of_tables = {"--column": options.column, "--id-column": options.id_column, "--conversations": options.conversations}
    of_files = of_tables | {"--format": options.format, "--encoding": options.encoding}
    for name, value in of_files.items():
        if options.text is not None and value is not None:
            raise UserError(f"{name}: is about --file, and texts are given by --text. Leave one of them out.")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {options.max_new_tokens} is no length of an answer. Give 1 or more.")
    if options.encoding is not None:
        try:
            codecs.lookup(options.encoding)
        except LookupError:
            raise UserError(
                f"--encoding: {options.encoding!r} is unknown; utf-8, utf-16, cp1252 and the others in "
                "https://docs.python.org/3/library/codecs.html#standard-encodings are known."
            ) from None
    paths = [Path(name) for name in (options.file, options.output) if name not in (None, "-")]
    if len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1]):
        raise UserError(f"--output: {options.output} is the file to be read. Name another one.")


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
    from serving.adapter import is_ours
    from serving.predictor import MAX_NEW_TOKENS
    from stages.common.params import PARAMS_PATH, load_params

    if options.max_new_tokens is not None:
        return int(options.max_new_tokens)
    if adapter.answers_with_texts and is_ours(adapter.folder) and PARAMS_PATH.is_file():
        return load_params("infer").infer.max_new_tokens or MAX_NEW_TOKENS
    return MAX_NEW_TOKENS
