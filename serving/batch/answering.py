"""Rows into lines of the output, and what became of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.batch.rows import Row
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


def tell(text: str) -> None:
    """Say something beside the answers."""
    print(f"predict: {text}", file=sys.stderr, flush=True)
