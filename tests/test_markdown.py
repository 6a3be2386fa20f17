"""Any text can stand in a table: a Markdown parser gives back what was put in."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from stages.common.measuring.markdown import literal, markdown_table, text_cell

HARD = [
    "a | b || c \\| d \\",
    "line\nline\r\nline\n\nparagraph",
    "# heading\n- item\n1. item\n> quote\n---\n===",
    "```python\ndef f(x):\n    return x * x  # <b>\n```",
    "~~~\nfence\n~~~",
    "`code` ``co`de`` **bold** _it_ __init__ ~~gone~~ a*b*c",
    "<script>alert(1)</script> <br> <!-- comment --> <a href='x'>y</a> &amp; &lt; &#35; &nbsp;",
    "[link](http://a.b) ![image](x.png) [ref][1]\n[1]: http://c.d",
    "$x^2$ and $$y$$ for 5 $",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "\\* \\| \\\\ \\<",
    "*(empty)*",
    "Ещё текст, 今天, 🎉, naïve, \u202eturned",
]


class Cells(HTMLParser):
    """The texts of a table's cells, a `<br>` as a line; and which other tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.texts.append("")
        if tag == "br":
            self.texts[-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def rendered(*texts: str) -> Cells:
    """What a reader of GitHub's Markdown sees of a row."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = Cells()
    found.feed(parser.render(markdown_table(["title"] * len(texts), [texts], padded=False)))
    found.texts = [text.rstrip("\n") for text in found.texts[len(texts) : 2 * len(texts)]]
    return found


@pytest.mark.parametrize("text", HARD)
def test_a_text_reads_as_it_is_beside_any_other(text: str) -> None:
    found = rendered(*(text_cell(one, 10_000) for one in (text, *HARD)))
    expected = "\n".join(text.splitlines()).replace("\u202e", "\ufffd")
    assert found.texts[0].replace("\u00a0", " ") == expected
    assert len(found.texts) == 1 + len(HARD)
    assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}


def test_indentation_is_kept_and_control_characters_are_shown_as_such() -> None:
    assert rendered(text_cell("if x:\n\treturn\n  y", 100)).texts == [
        "if x:\n\u00a0\u00a0\u00a0\u00a0return\n\u00a0\u00a0y"
    ]
    assert rendered(text_cell("a\x00b\x1bc", 100)).texts == ["a\ufffdb\ufffdc"]


def test_a_long_text_shows_its_beginning_its_end_and_what_is_missing() -> None:
    text = "start " + "*|<`\n" * 1200 + "last words"
    found = rendered(text_cell(text, 500))
    assert found.texts[0].startswith("start *|<`\n*|<`")
    assert found.texts[0].endswith("<`\nlast words")
    assert f" [… {len(text) - 500:,} characters …] " in found.texts[0]
    assert len(found.texts[0]) < 540
    assert found.tags == {"table", "thead", "tbody", "tr", "th", "td", "br", "em"}
    assert text_cell("x" * 500, 500) == "x" * 500


def test_an_empty_text_is_called_empty_and_a_text_that_says_so_is_not() -> None:
    assert "em" in rendered(text_cell(" \n", 10)).tags
    assert "em" not in rendered(text_cell("*(empty)*", 10)).tags


def test_a_name_with_a_line_break_stays_in_its_row() -> None:
    assert rendered(literal("a\n| b")).texts == ["a | b"]
