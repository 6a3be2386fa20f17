"""Pieces of a page that several of its sections need."""

from __future__ import annotations

from review.rendering import Block, Code, Paragraph, Span


def signed(value: float) -> str:
    """A difference with its sign: counts whole, others with four decimals or in powers of ten."""
    if isinstance(value, int):
        return f"{value:+,}"
    return f"{value:+.4f}" if value == 0 or 0.0001 <= abs(value) < 1e6 else f"{value:+.1e}"


def joined(ids: list[str]) -> list[Span]:
    """Ids with commas between them."""
    spans: list[Span] = []
    for row_id in ids:
        spans += [Code(row_id), ", "]
    return spans[:-1]


def and_more(count: int) -> str:
    """How many more there are, behind a list; nothing where there are none."""
    return f" and {count:,} more" if count > 0 else ""


def more(count: int, what: str) -> list[Block]:
    """The same as a paragraph below a table."""
    return [Paragraph([f"And {count:,} {what}; `--json` has all of them."])] if count > 0 else []
