"""CSV that comes back as it was, and cells that no spreadsheet takes for formulas, after OWASP's advice.

https://owasp.org/www-community/attacks/CSV_Injection
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

# At the beginning of a cell they make a spreadsheet compute it; the wide ones and white space do so in some.
FORMULA_STARTS = tuple("=+-@＝＋－＠\t\r\n")


def neutral(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: with an apostrophe before it, which says "this is text".

    Cells that begin with such an apostrophe already get one more, so that `original` gives every cell back.
    """
    return f"'{cell}" if cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def original(cell: str) -> str:
    """The cell that `neutral` was given."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV whose lines end in a line feed."""
    lines: list[str] = []
    # Python quotes a cell for what is in its own line end alone: with "\n" a carriage return would end a row.
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)
