"""Answers as HTML: what comes from a user, a file or a model is escaped, so that it is shown and never acts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from serving.web.answers import Line, Threshold

ROWS_ON_A_PAGE = 25
# More of a text is not looked at in a table; the download has all of it.
MOST_SHOWN_CHARACTERS = 2_000
# Of more labels than this the likeliest are shown.
MOST_BARS = 6


def pages(lines: Sequence[Line]) -> int:
    """How many pages the rows take, at least one."""
    return max(1, -(-len(lines) // ROWS_ON_A_PAGE))


def summary(lines: Sequence[Line]) -> str:
    """What became of all rows, in one line of HTML."""
    answered = [line for line in lines if "error" not in line]
    names = Counter(name for line in answered for name in (line["labels"] if "labels" in line else [line["label"]]))
    counts = [f"<b>{count:,}</b> {escape(name)}" for name, count in names.most_common(MOST_BARS)]
    if len(names) > MOST_BARS:
        counts.append(f"{len(names) - MOST_BARS:,} more labels")
    others = {
        "without any label": sum(line.get("labels") == [] for line in answered),
        "unsure": sum(line.get("unsure", False) for line in answered),
        "shortened": sum("shortened" in line for line in answered),
        "without an answer": len(lines) - len(answered),
    }
    counts += [f"<b>{count:,}</b> {name}" for name, count in others.items() if count]
    return f"<p class='summary'>{len(lines):,} {'row' if len(lines) == 1 else 'rows'}: {', '.join(counts)}</p>"


def table(lines: Sequence[Line], threshold: Threshold, page: int) -> str:
    """The rows of one page, each with its text, label and probability bars.

    Args:
        lines: all rows, decided.
        threshold: the adapter's; the bars that it is about carry a mark where it is.
        page: from 0.
    """
    shown = lines[page * ROWS_ON_A_PAGE : (page + 1) * ROWS_ON_A_PAGE]
    body = "".join(_row(line, threshold) for line in shown)
    return (
        "<table class='answers'><thead><tr><th scope='col'>Text</th><th scope='col'>Answer</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _row(line: Line, threshold: Threshold) -> str:
    text = line["text"]
    if len(text) > MOST_SHOWN_CHARACTERS:
        text = f"{text[:MOST_SHOWN_CHARACTERS]}… ({len(text):,} characters in all)"
    answer = f"<p class='problem'>{escape(line['error'])}</p>" if "error" in line else _answer(line, threshold)
    return (
        f"<tr><td><div class='id'>{escape(line['id'])}</div><div class='text' dir='auto'>{escape(text)}</div></td>"
        f"<td>{answer}</td></tr>"
    )


def _answer(line: Line, threshold: Threshold) -> str:
    chosen = line["labels"] if "labels" in line else [line["label"]]
    chips = [f"<span class='chip'>{escape(label)}</span>" for label in chosen] or [
        "<span class='subdued'>no label</span>"
    ]
    chips += [f"<span class='remark'>{name}</span>" for name in ("unsure", "shortened") if line.get(name)]
    likeliest = sorted(line["probabilities"], key=lambda label: -line["probabilities"][label])[:MOST_BARS]
    bars = [
        _bar(label, line["probabilities"][label], label in chosen, _mark(line, label, threshold))
        for label in line["probabilities"]
        if label in likeliest
    ]
    hidden = len(line["probabilities"]) - len(bars)
    rest = f"<p class='subdued'>{hidden:,} less likely labels</p>" if hidden else ""
    return f"<div class='chips'>{''.join(chips)}</div>{''.join(bars)}{rest}"


def _mark(line: Line, label: str, threshold: Threshold) -> float | None:
    """Where the threshold is that decides about this label's bar."""
    if threshold.decides == "labels":
        return float(line["thresholds"][label])
    if threshold.decides == "unsure":
        return float(line["least_probability"]) if label == line["label"] else None
    return float(line["threshold"]) if label == threshold.positive_label else None


def _bar(label: str, probability: float, is_answer: bool, mark: float | None) -> str:
    tick = "" if mark is None else f"<i class='mark' style='left:{mark:.2%}' title='threshold {mark:.3g}'></i>"
    return (
        f"<div class='bar{' answer' if is_answer else ''}'><span class='name'>{escape(label)}</span>"
        f"<span class='track'><i class='fill' style='width:{probability:.2%}'></i>{tick}</span>"
        f"<span class='percent' title='{probability!r}'>{probability:.1%}</span></div>"
    )
