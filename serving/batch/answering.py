"""Rows into lines of the output, and what became of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.batch.rows import Row
    from serving.common.adapter import Adapter
    from serving.predictor import Predictor

MOST_PROBLEMS_LISTED = 10


class Tally:
    """What became of the rows so far."""

    def __init__(self) -> None:
        self.rows = self.shortened = self.failed = 0
        self.problems: list[str] = []

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Count some lines of the output."""
        problems = [f"{line['id']}: {line['error']}" for line in lines if "error" in line]
        self.count(len(lines), sum("shortened" in line for line in lines), problems)

    def count(self, rows: int, shortened: int, problems: list[str]) -> None:
        """Count rows of which so much is known; each without an answer has a problem."""
        self.rows += rows
        self.shortened += shortened
        self.failed += len(problems)
        self.problems += problems[: MOST_PROBLEMS_LISTED - len(self.problems)]

    def summary(self) -> str:
        """In one line."""
        return f"{self.rows:,} rows, {self.shortened:,} shortened, {self.failed:,} without an answer"

    def require_answers(self, remedy: str) -> None:
        """Refuse to call it a success where rows have no answer.

        Raises:
            UserError: names the first of them; ends in the remedy.
        """
        if self.failed:
            raise UserError(
                f'{self.failed:,} of {self.rows:,} rows could not be answered; their lines have "error":\n  '
                + "\n  ".join(self.problems)
                + ("\n  …" if self.failed > len(self.problems) else "")
                + f"\n{remedy}"
            )


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


def tell(text: str) -> None:
    """Say something beside the answers."""
    print(f"predict: {text}", file=sys.stderr, flush=True)
