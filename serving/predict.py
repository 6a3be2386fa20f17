"""Answer texts with an adapter: `python -m serving.predict --text "..."`, one JSON object a line on stdout.

Answers are labels with probabilities, or texts, as the adapter was trained to give. All else goes to stderr.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from serving.batch.options import answer_limit, arguments, check_arguments, check_kind, encoding_name
from stages.common.errors import UserError, run_stage

if TYPE_CHECKING:
    from serving.batch.rows import Row
    from serving.common.adapter import Adapter
    from serving.predictor import Predictor

# Answered at a time: enough to sort by length, few enough to see lines soon.
ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2_000_000
MOST_PROBLEMS_LISTED = 10


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


def notes(adapter: Adapter, limit: int) -> Iterator[str]:
    """What a user should know about how answers are made."""
    from serving.common.adapter import DECISION, is_ours

    if adapter.answers_with_texts:
        yield f"answers have at most {limit:,} tokens (--max-new-tokens)"
    elif adapter.rule is None:
        found = (
            "the likeliest label is" if adapter.kind == "classification" else "labels of probability 0.5 or more are"
        )
        fetch = f"`dvc pull {DECISION}` fetches it" if is_ours(adapter.folder) else "--decision names one"
        yield f"{found} answered: a threshold chosen on validation would be in a decision.json; {fetch}"
    elif adapter.rule["rule"] == "answer":
        yield "the project's metrics are those of generated labels (infer.method: generate); here labels are scored"


class Tally:
    """What became of the rows so far."""

    def __init__(self) -> None:
        self.rows = self.shortened = self.failed = 0
        self.problems: list[str] = []

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Count some lines of the output."""
        problems = [f"{line['id']}: {line['error']}" for line in lines if "error" in line]
        self.rows += len(lines)
        self.shortened += sum("shortened" in line for line in lines)
        self.failed += len(problems)
        self.problems += problems[: MOST_PROBLEMS_LISTED - len(self.problems)]

    def summary(self) -> str:
        """In one line."""
        return f"{self.rows:,} rows, {self.shortened:,} shortened, {self.failed:,} without an answer"


def answer(
    batch: list[Row], load: Callable[[], Predictor], advance: Callable[[int], object] = lambda count: None
) -> list[dict[str, Any]]:
    """The lines of some rows, in their order; rows that cannot be answered have an error instead.

    Args:
        batch: the rows.
        load: gives the predictor, when there is anything to answer.
        advance: is told how many rows were answered.
    """
    contents = [row.content for row in batch if row.content is not None]
    answers = iter(load().predict(contents, advance) if contents else [])
    return [{"id": row.id, **({"error": row.problem} if row.content is None else next(answers))} for row in batch]


def tell(text: str) -> None:
    """Say something beside the answers."""
    print(f"predict: {text}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace, stdout: IO[bytes]) -> Tally:
    """Answer what the command line names.

    Raises:
        UserError: the input, the adapter or its base cannot be used.
    """
    from serving.batch.output import open_output, write
    from serving.batch.rows import batches
    from serving.common.adapter import ADAPTER, read_adapter
    from stages.common.progress import progress

    adapter = read_adapter(Path(options.adapter or ADAPTER), options.decision and Path(options.decision))
    check_kind(options, adapter)
    limit = answer_limit(options, adapter)
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

    require_streams(options.file == "-", options.output)
    check_output(options.output)
    try:
        with stdout_for_answers() as stdout:
            tally = run(options, stdout)
    except BrokenPipeError:
        # Whoever read the lines has seen enough, as head does: end as if the signal had ended this process.
        sys.exit(128 + signal.SIGPIPE)
    tell(tally.summary())
    if tally.failed:
        raise UserError(
            f'{tally.failed:,} of {tally.rows:,} rows could not be answered; their lines have "error":\n  '
            + "\n  ".join(tally.problems)
            + ("\n  …" if tally.failed > len(tally.problems) else "")
            + "\nCorrect these rows and run again; all others are answered."
        )


if __name__ == "__main__":
    run_stage(main)
