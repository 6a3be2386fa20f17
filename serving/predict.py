"""Answer texts with an adapter: `python -m serving.predict --text "..."`, one JSON object a line on stdout.

Answers are labels with probabilities, or texts, as the adapter was trained to give. All else goes to stderr.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from serving.batch.answering import Tally, answer, tell
from serving.batch.options import arguments, check_arguments, check_kind, encoding_name
from stages.common.errors import UserError, run_stage

if TYPE_CHECKING:
    from serving.batch.rows import Row
    from serving.predictor import Predictor

# Answered at a time: enough to sort by length, few enough to see lines soon.
ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2_000_000


def read_input(options: argparse.Namespace, kind: str) -> Iterator[Row]:
    """The rows that the command line names.

    Args:
        options: checked.
        kind: the adapter's kind of task.

    Raises:
        UserError: the file cannot be read, or an option does not fit its format.
    """
    from serving.batch.files import format_name
    from serving.batch.rows import Columns, line_rows, table_rows, text_rows

    if options.text is not None:
        return text_rows(options.text)
    form, encoding = format_name(options.file, options.format), encoding_name(options.encoding or "utf-8")
    if form == "text":
        for name in ("column", "id_column", "conversations"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')}: {options.file} is read as one text a line, without columns. Leave it "
                    "out, or say with --format what kind of table that is."
                )
        return line_rows(options.file, encoding)
    if form == "parquet" and options.encoding is not None:
        raise UserError("--encoding: Parquet files have their own. Leave it out.")
    column = "text" if options.column is None else options.column
    columns = Columns(column, options.id_column, options.conversations, kind)
    return table_rows(options.file, form, encoding, columns)


def run(options: argparse.Namespace, stdout: IO[bytes]) -> Tally:
    """Answer what the command line names.

    Raises:
        UserError: the input, the adapter or its base cannot be used.
    """
    from serving.batch.output import open_output, write
    from serving.batch.rows import batches
    from serving.common.adapter import ADAPTER, read_adapter
    from serving.common.notes import answer_limit, notes
    from stages.common.progress import progress

    adapter = read_adapter(Path(options.adapter or ADAPTER), options.decision and Path(options.decision))
    check_kind(options, adapter)
    limit = answer_limit(options.max_new_tokens, adapter)
    found = batches(read_input(options, adapter.kind), ROWS_AT_ONCE, CHARACTERS_AT_ONCE)
    if options.file == "-" and sys.stdin.isatty():
        tell("reading from the terminal; Ctrl-D ends the input")
    first = next(found, None)
    if first is None:
        raise UserError(f"--file: {options.file} holds no rows, so there is nothing to answer.")

    @functools.cache
    def predictor() -> Predictor:
        from serving.predictor import load

        for note in notes(adapter, limit):
            tell(note)
        return load(adapter, limit)

    tally = Tally()
    with open_output(options.output, stdout) as file, progress(options.text and len(options.text), "answering") as bar:
        for batch in itertools.chain([first], found):
            lines = answer(batch, predictor, bar.update)
            bar.update(sum("error" in line for line in lines))
            tally.add(lines)
            write(file, lines)
    return tally


def main() -> None:
    """Write a line for each row, and say on stderr what became of them."""
    options = arguments(__doc__)
    check_arguments(options)
    from serving.batch.output import check_output, require_streams, stdout_for_answers

    require_streams(options.file == "-", options.output_folder or options.output)
    if options.folder is not None:
        from serving.batch.folder_run import run_folder

        with stdout_for_answers():
            run_folder(options)
        return
    check_output(options.output)
    try:
        with stdout_for_answers() as stdout:
            tally = run(options, stdout)
    except BrokenPipeError:
        # Whoever read the lines has seen enough, as head does: end as if the signal had ended this process.
        sys.exit(128 + signal.SIGPIPE)
    tell(tally.summary())
    tally.require_answers("Correct these rows and run again; all others are answered.")


if __name__ == "__main__":
    run_stage(main)
