"""What the columns of the report's tables show of a predictor's block of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.common.measuring.markdown import markdown_table, number

Blocks = dict[str, dict[str, Any]]
Column = tuple[str, Callable[[dict[str, Any]], str]]

NAMES = {
    "adapter": "adapter",
    "base": "zero-shot base",
    "tfidf": "TF-IDF + logistic regression",
    "majority": "majority",
}
ANSWER_NAMES = NAMES | {"tfidf": "nearest question (TF-IDF)", "majority": "most frequent answer"}


def with_interval(block: dict[str, Any], name: str) -> str:
    """A metric and its 95 % interval, as `0.829 [0.791, 0.864]`; a dash where it is not there."""
    if name not in block:
        return number(None)
    return f"{number(block[name])} [{number(block[f'{name}_low'])}, {number(block[f'{name}_high'])}]"


def plain(title: str, name: str) -> Column:
    """A column of a metric."""
    return title, lambda block: number(block.get(name))


def interval(title: str, name: str) -> Column:
    """A column of a metric with its interval."""
    return f"{title} [95 %]", lambda block: with_interval(block, name)


def share(title: str, name: str) -> Column:
    """A column of a share in percent."""
    return title, lambda block: f"{block[name]:.1%}"


def predictor_table(blocks: Blocks, columns: Sequence[Column], names: Mapping[str, str] = NAMES) -> str:
    """A row for each predictor."""
    return markdown_table(
        ["", *(title for title, _ in columns)],
        [[name, *(shown(blocks[key]) for _, shown in columns)] for key, name in names.items()],
    )
