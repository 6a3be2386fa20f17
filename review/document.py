"""The result of a comparison as a page: verdict, parameters, data, metrics, labels, flipped rows, baselines."""

from __future__ import annotations

from review.changed_sections import data_blocks, parameter_blocks
from review.effect_sections import baseline_blocks, flip_blocks, label_blocks, metric_blocks
from review.entries import Entry
from review.rendering import Block, Bullets, Code, Heading, Paragraph, Strong


def page_of(result: Entry) -> list[Block]:
    """All blocks of the page."""
    title = Heading(1, ["Comparison of ", Code(result["before"]["title"]), " with ", Code(result["after"]["title"])])
    opening, _, rest = result["verdict"]["text"].partition(":")
    return [
        title,
        Paragraph([Strong(f"{opening}:"), rest]),
        *([Bullets([["Caution: ", caution] for caution in result["cautions"]])] if result["cautions"] else []),
        Heading(2, ["Parameters"]),
        *parameter_blocks(result["parameters"]),
        Heading(2, ["Data"]),
        *data_blocks(result),
        Heading(2, ["Metrics on test"]),
        *metric_blocks(result),
        *label_blocks(result["per_class"]),
        *flip_blocks(result["flipped"]),
        *baseline_blocks(result["baselines"]),
    ]
