"""Cells of CSV files that no spreadsheet takes for formulas, after OWASP's advice on CSV injection.

https://owasp.org/www-community/attacks/CSV_Injection
"""

from __future__ import annotations

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
