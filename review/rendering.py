"""Blocks of a page become Markdown, or HTML that needs nothing else; what comes from the data is never markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from stages.common.measuring.markdown import literal, markdown_table, text_cell

MOST_CHARACTERS = 200
# What Markdown, GitHub's formulas and HTML could take for markup in a line of ours; underscores inside words are not.
_SIGNS = re.compile(r"([\\*\[\]&|~$#]|<(?=[A-Za-z/!?]))")
# As in stages.common.measuring.markdown: control characters, and those that turn the direction of what follows.
_UNSHOWABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top; }}
code {{ background: #8882; padding: 0 .2em; overflow-wrap: anywhere; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


class Code(NamedTuple):
    """An id, label, key or command, shown as it is."""

    value: str


class Excerpt(NamedTuple):
    """A text from the data, shown as it is and shortened visibly."""

    value: str


class Strong(NamedTuple):
    """Words of ours that stand out."""

    value: str


# A plain string is a line of ours; what lies between backticks in it is shown as code.
Span = str | Code | Excerpt | Strong
Line = Sequence[Span]


class Heading(NamedTuple):
    """A heading of level 1 to 6."""

    level: int
    line: Line


class Paragraph(NamedTuple):
    """A paragraph."""

    line: Line


class Bullets(NamedTuple):
    """A list."""

    lines: Sequence[Line]


class Table(NamedTuple):
    """A table; each cell is one line."""

    header: Sequence[str]
    rows: Sequence[Sequence[Line]]


Block = Heading | Paragraph | Bullets | Table


def markdown_page(blocks: Sequence[Block]) -> str:
    """The page as Markdown, with a line break at its end."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def html_page(blocks: Sequence[Block], title: str) -> str:
    """The page as one HTML file that loads nothing: style included, no script."""
    return _PAGE.format(title=_shown(title), body="\n".join(_html_block(block) for block in blocks))


def _markdown_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_markdown_line(block.line)}"
    if isinstance(block, Paragraph):
        return _markdown_line(block.line)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_markdown_line(line)}" for line in block.lines)
    with_texts = any(isinstance(span, Excerpt) for row in block.rows for cell in row for span in cell)
    rows = [[_markdown_line(cell) for cell in row] for row in block.rows]
    return markdown_table(block.header, rows, padded=not with_texts)


def _markdown_line(line: Line) -> str:
    return "".join(_markdown_span(span) for span in _spans(line))


def _markdown_span(span: Span) -> str:
    if isinstance(span, Code):
        return literal(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", span.value))
    if isinstance(span, Excerpt):
        return text_cell(span.value, MOST_CHARACTERS)
    if isinstance(span, Strong):
        return f"**{_escaped(span.value)}**"
    return _escaped(span)


def _escaped(text: str) -> str:
    return _SIGNS.sub(r"\\\1", " ".join(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text).splitlines()))


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_html_line(block.line)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_html_line(block.line)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_html_line(line)}</li>" for line in block.lines) + "</ul>"
    header = "".join(f"<th>{_shown(title)}</th>" for title in block.header)
    rows = ["".join(f"<td>{_html_line(cell)}</td>" for cell in row) for row in block.rows]
    return "\n".join(["<table>", f"<tr>{header}</tr>", *(f"<tr>{row}</tr>" for row in rows), "</table>"])


def _html_line(line: Line) -> str:
    return "".join(_html_span(span) for span in _spans(line))


def _html_span(span: Span) -> str:
    if isinstance(span, Code):
        return f"<code>{_shown(span.value)}</code>"
    if isinstance(span, Excerpt):
        left_out = len(span.value) - MOST_CHARACTERS
        ending = f" <em>[… {left_out:,} more characters]</em>" if left_out > 0 else ""
        # In an element of its own a text cannot turn the direction of its neighbours.
        return f'<bdi class="text">{_shown(span.value[:MOST_CHARACTERS])}</bdi>{ending}'
    return f"<strong>{_shown(span.value)}</strong>" if isinstance(span, Strong) else _shown(span)


def _shown(text: str) -> str:
    return html.escape(_UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def _spans(line: Line) -> list[Span]:
    """The line with what lies between backticks in plain strings as code."""
    spans: list[Span] = []
    for span in line:
        if isinstance(span, str) and span.count("`") % 2 == 0:
            parts = span.split("`")
            spans += [Code(part) if place % 2 else part for place, part in enumerate(parts) if part]
        else:
            spans.append(span)
    return spans
