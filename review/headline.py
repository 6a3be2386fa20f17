"""The one line that a comparison comes down to."""

from __future__ import annotations

from typing import Any

from review.verdicts import BETTER, NOISE, SAME, UNKNOWN, WITHHELD, WORSE

OPENINGS = {
    BETTER: "Better",
    WORSE: "Worse",
    NOISE: "Within noise",
    SAME: "No change",
    WITHHELD: "Withheld",
    UNKNOWN: "Cannot tell",
}


def p_value(value: float) -> str:
    """A p-value behind a p."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def headline(metrics: dict[str, Any], key: str, title: str, rows: dict[str, Any], unlike_answers: int | None) -> str:
    """Verdict, headline metric, and what the other metrics say.

    Args:
        metrics: as in the result.
        key: the headline metric.
        title: its name in a sentence.
        rows: how the test rows differ, as in the result.
        unlike_answers: how many answers differ; None where both sides' predictions are identical.
    """
    entry = metrics[key]
    if all(one["verdict"] in (SAME, None) for one in metrics.values()):
        if unlike_answers is None:
            return f"{OPENINGS[SAME]}: both sides give the same predictions {_where(rows)}."
        unlike = f"{unlike_answers:,} answers differ" if unlike_answers else "probabilities differ"
        return f"{OPENINGS[SAME]}: no metric moved {_where(rows)}, but {unlike}."
    details = [f"{entry['difference']:+.4f}", f"95 % interval {entry['low']:+.4f} to {entry['high']:+.4f}"]
    if entry["p"] is not None:
        details.append(f"p {p_value(entry['p'])}")
    opening = OPENINGS[entry["verdict"]]
    if entry["verdict"] == WITHHELD:
        opening += ", since less than half of the test rows are common to both sides"
    sentence = f"{opening}: {title} {entry['before']:.3f} → {entry['after']:.3f} ({', '.join(details)}) {_where(rows)}."
    if entry["noise"] is not None and entry["verdict"] in (BETTER, WORSE):
        place = "inside" if entry["noise"]["inside"] else "outside"
        sentence += f" The difference lies {place} the noise of {entry['noise']['seeds']} seeds."
    return sentence + _others(metrics, key)


def unjudged(said: str, reason: str, measured: bool, other_split: bool) -> str:
    """The line where the predictions were not compared row by row.

    Args:
        said: the verdict.
        reason: for it; not needed for "no change".
        measured: whether both sides have a metrics file.
        other_split: whether dvc.lock names another file of test rows on each side.
    """
    if said == SAME:
        return f"{OPENINGS[SAME]}: dvc.lock has the same predictions and decisions on both sides."
    numbers = (
        "The numbers below are those of metrics/metrics.json" if measured else "One side has no metrics/metrics.json"
    )
    if said == WITHHELD:
        return f"{OPENINGS[said]}: {reason}. {numbers}: of different test sets, which do not compare."
    return (
        f"{OPENINGS[said]}: predictions are missing. {reason}. To have them, `dvc pull` at that revision where a "
        "remote has them, `dvc push` where they were made, or make them again with `dvc repro`. "
        f"{numbers}, without a paired test{', and perhaps of other rows' if other_split else ''}."
    )


def _where(rows: dict[str, Any]) -> str:
    """On which rows, with the preposition."""
    common = rows["common"]
    if common == rows["before"] == rows["after"]:
        return f"on the same {common:,} test rows"
    sizes = f"{rows['before']:,} before and {rows['after']:,} after"
    return f"on the {common:,} test rows that both sides have alike, of {sizes}"


def _others(metrics: dict[str, Any], key: str) -> str:
    """Which of the other metrics are better or worse."""
    said = []
    for verdict in (BETTER, WORSE):
        names = [name for name, entry in metrics.items() if name != key and entry["verdict"] == verdict]
        if names:
            said.append(f"{verdict}: {', '.join(names)}")
    return f" Of the other metrics, {'; '.join(said)}." if said else ""
