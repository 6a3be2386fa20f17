"""The sections of a comparison's page about what the change did: metrics, labels, flipped rows, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from review.entries import LISTED_FLIPS, Entry
from review.headline import p_value
from review.page_pieces import and_more, more, signed
from review.rendering import Block, Bullets, Code, Excerpt, Heading, Line, Paragraph, Strong, Table
from review.verdicts import BETTER, SIGNIFICANT, WORSE
from stages.common.measuring.markdown import number
from stages.common.measuring.report_columns import NAMES

# A page is read, and GitHub takes 65,536 characters in a comment; --json has everything.
LISTED_LABELS, LISTED_METRICS = 20, 3


def metric_blocks(result: Entry) -> list[Block]:
    """Each metric, on the common rows where predictions are there."""
    metrics, noise = result["metrics"], result["noise"]
    if not metrics:
        return [Paragraph(["No numbers to compare."])]
    if result["resamples"] is None:
        return [_unpaired_table(metrics)]
    header = ["metric", "before", "after", "difference", "95 % interval", "p", "verdict"]
    rows = [
        [
            [name],
            [number(entry["before"])],
            [number(entry["after"])],
            [signed(entry["difference"])],
            ["–" if entry["low"] is None else f"{signed(entry['low'])} to {signed(entry['high'])}"],
            ["–" if entry["p"] is None else p_value(entry["p"]).removeprefix("= ")],
            _verdict(entry["verdict"]),
            *([_noise(entry["noise"])] if noise else []),
        ]
        for name, entry in metrics.items()
    ]
    common = result["data"]["test"]["common"]
    blocks: list[Block] = [
        Table([*header, *([f"noise of {len(noise['seeds'])} seeds"] if noise else [])], rows),
        Paragraph(
            [
                f"{common:,} common test rows; {result['resamples']:,} resamples of rows. p: McNemar's exact test for "
                "accuracy, permutation tests for the others; below 0.05 a difference is called better or worse. "
                "Without a test the interval decides."
            ]
        ),
    ]
    return blocks


def _unpaired_table(metrics: Entry) -> Table:
    rows = [
        [
            [name],
            *(
                [_with_interval(entry[end], entry["own_intervals"][side])]
                for side, end in enumerate(("before", "after"))
            ),
            [signed(entry["difference"])],
            _verdict(entry["verdict"]),
        ]
        for name, entry in metrics.items()
    ]
    return Table(["metric", "before (own 95 % interval)", "after (own 95 % interval)", "difference", "verdict"], rows)


def _with_interval(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def label_blocks(per_class: Entry) -> list[Block]:
    """The F1 of labels; nothing where answers are texts."""
    if not per_class:
        return []
    ordered = list(per_class.items())
    if len(ordered) > LISTED_LABELS:
        ordered.sort(key=lambda item: -abs(item[1]["difference"]))
    paired = ordered[0][1]["p"] is not None
    rows: list[list[Line]] = [
        [
            [Code(label)],
            [number(entry["support"])],
            [number(entry["before"])],
            [number(entry["after"])],
            [signed(entry["difference"])],
            *([_label_p(entry)] if paired else []),
        ]
        for label, entry in ordered[:LISTED_LABELS]
    ]
    header = ["label", "rows", "F1 before", "F1 after", "difference", *(["p (Holm)"] if paired else [])]
    return [Heading(2, ["Labels"]), Table(header, rows), *more(len(ordered) - LISTED_LABELS, "labels that moved less")]


def _label_p(entry: Entry) -> Line:
    shown = p_value(entry["p"]).removeprefix("= ")
    if entry["p"] >= SIGNIFICANT or not entry["difference"]:
        return [shown]
    return [f"{shown}, ", Strong(BETTER if entry["difference"] > 0 else WORSE)]


def flip_blocks(flipped: Entry | None) -> list[Block]:
    """Rows whose answers changed for better or worse; nothing without predictions."""
    if flipped is None:
        return []
    fixed, broken = flipped["rows"]["fixed"], flipped["rows"]["broken"]
    texts = bool(fixed or broken) and "label" not in (fixed or broken)[0]
    words = (("closer to the reference", "farther from it"), ("fixed", "broken"))[not texts]
    unlike = "answered otherwise with the same score" if texts else "wrong before and after, in another way"
    blocks: list[Block] = [
        Heading(2, ["Flipped rows"]),
        Paragraph(
            [f"{flipped['fixed']:,} {words[0]}, {flipped['broken']:,} {words[1]}; {flipped['still_wrong']:,} {unlike}."]
        ),
    ]
    for kind, word in zip(("fixed", "broken"), words, strict=True):
        if flipped["rows"][kind]:
            first = "largest changes" if texts else "surest answers"
            listed = f"The {min(LISTED_FLIPS, flipped[kind])} {first} first:"
            blocks += [Heading(3, [word.capitalize()]), Paragraph([listed]), _flip_table(flipped["rows"][kind])]
    return blocks


def _flip_table(rows: Sequence[Entry]) -> Table:
    columns: list[tuple[str, str, Any]] = [("id", "id", Code)]
    if "label" in rows[0]:
        columns += [("label", "label", Code), ("before", "before", Code), ("after", "after", Code)]
        columns.append(("confidence", "confidence", lambda value: number(value)))
    else:
        columns += [(end, f"token F1 {end}", lambda value: number(value)) for end in ("before", "after")]
    columns += [
        (key, title, Excerpt) for key, title in (("text", "text"), ("reference", "reference")) if key in rows[0]
    ]
    cells: list[list[Line]] = [[[shown(row[key])] for key, _, shown in columns] for row in rows]
    header = [title for _, title, _ in columns]
    if "answers" in rows[0]:
        header += ["answer before", "answer after"]
        cells = [[*cell, *([Excerpt(text)] for text in row["answers"])] for cell, row in zip(cells, rows, strict=True)]
    return Table(header, cells)


def baseline_blocks(moved: Entry) -> list[Block]:
    """Predictors that moved though no training touches them; nothing where none did."""
    if not moved:
        return []
    lines: list[Line] = [
        [f"{NAMES[name]}: {', '.join(_moved(metrics))}{and_more(len(metrics) - LISTED_METRICS)}"]
        for name, metrics in moved.items()
    ]
    said = (
        "Training touches none of these predictors, but their numbers in metrics/metrics.json differ. So something "
        "else changed too: the data, the prompt, the way of measuring, code or libraries."
    )
    return [Heading(2, ["Baselines that moved"]), Paragraph([said]), Bullets(lines)]


def _moved(metrics: Entry) -> list[str]:
    """The largest moves."""
    ordered = sorted(metrics.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    return [f"{name} {number(before)} → {number(after)}" for name, (before, after) in ordered[:LISTED_METRICS]]


def _verdict(said: str | None) -> Line:
    if said is None:
        return ["–"]
    return [Strong(said)] if said in (BETTER, WORSE) else [said]


def _noise(noise: Entry | None) -> Line:
    if noise is None:
        return ["–"]
    return [f"{'inside' if noise['inside'] else 'outside'} (±{noise['limit']:.4f})"]
