"""The result of a comparison as a page: verdict, parameters, data, metrics, labels, flipped rows, baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from review.entries import LISTED_FLIPS, Entry
from review.headline import p_value
from review.rendering import Block, Bullets, Code, Excerpt, Heading, Line, Paragraph, Span, Strong, Table
from review.verdicts import BETTER, SIGNIFICANT, WORSE
from stages.common.measuring.markdown import number
from stages.common.measuring.report_columns import NAMES

# A page is read, and GitHub takes 65,536 characters in a comment; --json has everything.
LISTED_PARAMETERS, LISTED_IDS, LISTED_LABELS, LISTED_METRICS = 60, 10, 20, 3
MOST_OF_A_VALUE = 200


def page_of(result: Entry) -> list[Block]:
    """All blocks of the page."""
    title = Heading(1, ["Comparison of ", Code(result["before"]["title"]), " with ", Code(result["after"]["title"])])
    opening, _, rest = result["verdict"]["text"].partition(":")
    return [
        title,
        Paragraph([Strong(f"{opening}:"), rest]),
        *([Bullets([["Caution: ", caution] for caution in result["cautions"]])] if result["cautions"] else []),
        Heading(2, ["Parameters"]),
        *_parameters(result["parameters"]),
        Heading(2, ["Data"]),
        *_data(result),
        Heading(2, ["Metrics on test"]),
        *_metrics(result),
        *_labels(result["per_class"]),
        *_flips(result["flipped"]),
        *_baselines(result["baselines"]),
    ]


# --- what was changed -------------------------------------------------------------------------------------------------


def _parameters(changed: list[Entry]) -> list[Block]:
    if not changed:
        return [Paragraph(["The same on both sides."])]
    rows = [
        [[Code(entry["key"])], _value(entry, "before"), _value(entry, "after")] for entry in changed[:LISTED_PARAMETERS]
    ]
    return [Table(["key of params.yaml", "before", "after"], rows), *_more(len(changed) - LISTED_PARAMETERS, "keys")]


def _value(entry: Entry, end: str) -> Line:
    if end not in entry:
        return ["(not there)"]
    text = json.dumps(entry[end], ensure_ascii=False)
    return [Code(text if len(text) <= MOST_OF_A_VALUE else f"{text[:MOST_OF_A_VALUE]}…")]


def _data(result: Entry) -> list[Block]:
    lines: list[Line] = []
    listed: list[Block] = []
    for part, entry in result["data"].items():
        if entry is None:
            lines.append([_split_line(part, result["same_split"][part])])
            continue
        lines.append(_rows_line(part, entry))
        listed += [block for block in (_ids(part, entry), _relabelled(part, entry)) if block]
    return [Bullets(lines), *listed, *_own_rows(result)]


def _split_line(part: str, same: bool | None) -> str:
    """What dvc.lock alone says about a part."""
    if same:
        return f"{part}: the same split on both sides, by dvc.lock."
    if same is None:
        return f"{part}: not known; dvc.lock of one side does not name the split."
    return f"{part}: dvc.lock names other files. Whether rows, texts or only prompts differ needs the predictions."


def _rows_line(part: str, entry: Entry) -> Line:
    changes = [
        f"{len(entry[key]):,} {words}"
        for key, words in (("added", "added"), ("removed", "removed"), ("relabelled", "relabelled"))
        if entry[key]
    ]
    if entry["text_changed"]:
        changes.append(f"{len(entry['text_changed']):,} with another text")
    if not changes:
        return [f"{part}: the same {entry['after']:,} rows on both sides."]
    return [
        f"{part}: {entry['before']:,} rows before, {entry['after']:,} after: {', '.join(changes)}. "
        f"{entry['common']:,} rows are common to both sides with the same label and text"
        f"{', and only these are compared' if part == 'test' else ''}."
    ]


def _ids(part: str, entry: Entry) -> Block | None:
    lines: list[Line] = []
    for key, words in (("added", "added"), ("removed", "removed"), ("text_changed", "with another text")):
        ids = entry[key]
        if ids:
            lines.append([f"{part}, {words}: ", *_joined(ids[:LISTED_IDS]), _and_more(len(ids) - LISTED_IDS)])
    return Bullets(lines) if lines else None


def _relabelled(part: str, entry: Entry) -> Block | None:
    changed = entry["relabelled"]
    if not changed:
        return None
    if "before" not in changed[0]:
        ids = [one["id"] for one in changed]
        return Bullets([[f"{part}, relabelled: ", *_joined(ids[:LISTED_IDS]), _and_more(len(ids) - LISTED_IDS)]])
    rows = [[[Code(one["id"])], [Code(one["before"])], [Code(one["after"])]] for one in changed[:LISTED_IDS]]
    return Table([f"relabelled in {part}", "before", "after"], rows)


def _own_rows(result: Entry) -> list[Block]:
    if not result["own_rows"]:
        return []
    rows = [[[name], [number(before)], [number(after)]] for name, (before, after) in result["own_rows"].items()]
    said = "Each side on all of its own test rows. The test sets differ, so these columns do not compare:"
    return [Paragraph([said]), Table(["metric", "before, its own rows", "after, its own rows"], rows)]


# --- what it did ------------------------------------------------------------------------------------------------------


def _metrics(result: Entry) -> list[Block]:
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
            [_signed(entry["difference"])],
            ["–" if entry["low"] is None else f"{_signed(entry['low'])} to {_signed(entry['high'])}"],
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
            [_signed(entry["difference"])],
            _verdict(entry["verdict"]),
        ]
        for name, entry in metrics.items()
    ]
    return Table(["metric", "before (own 95 % interval)", "after (own 95 % interval)", "difference", "verdict"], rows)


def _with_interval(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def _labels(per_class: Entry) -> list[Block]:
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
            [_signed(entry["difference"])],
            *([_label_p(entry)] if paired else []),
        ]
        for label, entry in ordered[:LISTED_LABELS]
    ]
    header = ["label", "rows", "F1 before", "F1 after", "difference", *(["p (Holm)"] if paired else [])]
    return [Heading(2, ["Labels"]), Table(header, rows), *_more(len(ordered) - LISTED_LABELS, "labels that moved less")]


def _label_p(entry: Entry) -> Line:
    shown = p_value(entry["p"]).removeprefix("= ")
    if entry["p"] >= SIGNIFICANT or not entry["difference"]:
        return [shown]
    return [f"{shown}, ", Strong(BETTER if entry["difference"] > 0 else WORSE)]


def _flips(flipped: Entry | None) -> list[Block]:
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


def _baselines(moved: Entry) -> list[Block]:
    if not moved:
        return []
    lines: list[Line] = [
        [f"{NAMES[name]}: {', '.join(_moved(metrics))}{_and_more(len(metrics) - LISTED_METRICS)}"]
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


# --- cells ------------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    """A difference with its sign: counts whole, others with four decimals or in powers of ten."""
    if isinstance(value, int):
        return f"{value:+,}"
    return f"{value:+.4f}" if value == 0 or 0.0001 <= abs(value) < 1e6 else f"{value:+.1e}"


def _verdict(said: str | None) -> Line:
    if said is None:
        return ["–"]
    return [Strong(said)] if said in (BETTER, WORSE) else [said]


def _noise(noise: Entry | None) -> Line:
    if noise is None:
        return ["–"]
    return [f"{'inside' if noise['inside'] else 'outside'} (±{noise['limit']:.4f})"]


def _joined(ids: list[str]) -> list[Span]:
    spans: list[Span] = []
    for row_id in ids:
        spans += [Code(row_id), ", "]
    return spans[:-1]


def _and_more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""


def _more(count: int, what: str) -> list[Block]:
    return [Paragraph([f"And {count:,} {what}; `--json` has all of them."])] if count > 0 else []
