"""Numbers and texts as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Signs that Markdown, HTML, tables or GitHub's formulas could take for markup; as a number, a sign never is one.
_MARKUP = str.maketrans({sign: f"&#{ord(sign)};" for sign in r"\`*_[]~$|"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_UNQUOTABLE = re.compile(r"[`|\\]|[^\S ]|[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Control characters, and those that turn the direction of what follows, other cells included.
_UNSHOWABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], padded: bool = True) -> str:
    """A Markdown table, by default with padded columns, so that it can be read in a terminal too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) if padded else 3 for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def number(value: float | None) -> str:
    """Counts with separators, other numbers with three decimals (or in powers of ten), nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.1e}"


def literal(value: str) -> str:
    """A short text from the data as code, so that neither `<invalid>` nor a `|` is taken for markup."""
    line = " ".join(value.splitlines())
    # Within backticks a backtick, and in a table a | behind a backslash, could not be written; nor could nothing.
    if line.strip() and not _UNQUOTABLE.search(line):
        return f"`{line}`"
    return f"<code>{_UNSHOWABLE.sub(chr(0xFFFD), line).translate(_MARKUP)}</code>"


def text_cell(text: str, most: int) -> str:
    """Any text for a cell of a table, as it is: its signs are no markup, its lines and their indentation are kept.

    Args:
        text: any text.
        most: longest text in characters; of a longer one beginning and end are shown, and how much lies between. What
            is said about a text is in italics, which no text itself can be.
    """
    if not text.strip():
        return "*(empty)*"
    left_out = len(text) - most
    if left_out <= 0:
        return _lines(text)
    end = most // 3
    return f"{_lines(text[: most - end])} *[… {left_out:,} characters …]* {_lines(text[-end:])}"


def _lines(text: str) -> str:
    shown = []
    for line in text.expandtabs(4).splitlines():
        content = line.lstrip(" ")
        indentation = "&nbsp;" * (len(line) - len(content))
        shown.append(indentation + _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", content).translate(_MARKUP))
    return "<br>".join(shown)
