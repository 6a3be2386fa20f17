"""Whether an export answers as its adapter does: the two compared row by row, and a bound on what may differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from serving.common.adapter import Adapter
from serving.export.rows import TestRows
from serving.predictor import decide
from stages.common.errors import UserError

# Decides with several labels for a row where nothing else does.
HALF = 0.5


class LabelAnswers(NamedTuple):
    """What a model says of n rows: probabilities, float64 of shape (n, labels)."""

    probabilities: np.ndarray


class TextAnswers(NamedTuple):
    """What a model says at each token of the reference answers, all rows laid end to end.

    Attributes:
        likeliest: int64 (tokens,), the token that it finds likeliest there.
        log_likelihoods: float64 (tokens,), ln p of the reference's own token.
    """

    likeliest: np.ndarray
    log_likelihoods: np.ndarray


Answers = LabelAnswers | TextAnswers


def answer_ids(adapter: Adapter) -> list[list[int]]:
    """Token ids of every answer that is scored, terminators included: each label's, or of each label yes and no."""
    from stages.common.branches import label_branches

    prompt_format = adapter.prompt_format
    if adapter.kind == "multi_label":
        branches = label_branches(prompt_format.to_json()).values()
        return [ids for branch in branches for ids in (branch.yes, branch.no)]
    return [list(prompt_format.completions[label]["ids"]) for label in prompt_format.labels]


def label_probabilities(adapter: Adapter, log_likelihoods: np.ndarray) -> np.ndarray:
    """Probabilities (rows, labels) from the log-likelihoods (rows, answers) of `answer_ids`."""
    from stages.common.scoring.label_predictions import posterior

    if adapter.kind == "multi_label":
        return posterior(log_likelihoods.reshape(len(log_likelihoods), -1, 2))[:, :, 0]
    return posterior(log_likelihoods)


def compare(
    adapter: Adapter, rule: Mapping[str, Any], rows: TestRows, ours: Answers, theirs: Answers
) -> dict[str, Any]:
    """Compare an export's answers with its adapter's.

    Args:
        adapter: whose answers they are.
        rule: how its labels are decided; see `serving.predictor.decide`.
        rows: what was answered.
        ours: the adapter's.
        theirs: the export's.

    Returns:
        What parity.json says of it: "rows", "equal" (shares by what they are of, each of which has to reach the bound)
        and how large the differences are.
    """
    report = {"rows_file": rows.path.as_posix(), "rows_sha256": rows.sha256, "rows": len(rows.prompt_ids)}
    if isinstance(ours, LabelAnswers) and isinstance(theirs, LabelAnswers):
        return report | _compare_labels(adapter, rule, ours.probabilities, theirs.probabilities)
    assert isinstance(ours, TextAnswers) and isinstance(theirs, TextAnswers), "answers of one kind"
    return report | _compare_texts(ours, theirs)


def _compare_labels(adapter: Adapter, rule: Mapping[str, Any], ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    if adapter.kind == "multi_label":
        same = ((ours >= HALF) == (theirs >= HALF)).all(axis=1)
        equal = {"labels of probability 0.5 or more": float(same.mean())}
    else:
        equal = {"likeliest label": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())}
    names = adapter.prompt_format.labels
    pairs = zip(ours, theirs, strict=True)
    decided = [_decided(names, rule, before) == _decided(names, rule, after) for before, after in pairs]
    equal[f"label by the decision rule ({rule['rule']})"] = float(np.mean(decided))
    return {"equal": equal} | _differences(np.abs(ours - theirs))


def _decided(names: list[str], rule: Mapping[str, Any], probabilities: np.ndarray) -> Any:
    answer = decide(dict(zip(names, probabilities.tolist(), strict=True)), rule)
    return answer["labels"] if "labels" in answer else answer["label"]


def _compare_texts(ours: TextAnswers, theirs: TextAnswers) -> dict[str, Any]:
    same = float((ours.likeliest == theirs.likeliest).mean())
    return {
        "tokens": len(ours.likeliest),
        "equal": {"likeliest next token, along the reference answers": same},
        "perplexity_adapter": float(np.exp(-ours.log_likelihoods.mean())),
        "perplexity_export": float(np.exp(-theirs.log_likelihoods.mean())),
    } | _differences(np.abs(np.exp(ours.log_likelihoods) - np.exp(theirs.log_likelihoods)))


def _differences(differences: np.ndarray) -> dict[str, float]:
    return {
        "largest_probability_difference": float(differences.max()),
        "mean_probability_difference": float(differences.mean()),
    }


def describe(report: Mapping[str, Any]) -> str:
    """A comparison in one line."""
    equal = ", ".join(f"{what} equal {share:.2%}" for what, share in report["equal"].items())
    perplexity = ""
    if "tokens" in report:
        perplexity = f"; perplexity {report['perplexity_adapter']:.4f} and {report['perplexity_export']:.4f}"
    return (
        f"{report['rows']:,} rows of {report['rows_file']}: {equal}; probabilities differ by at most "
        f"{report['largest_probability_difference']:.3g}, on average {report['mean_probability_difference']:.3g}"
        f"{perplexity}"
    )


def require_parity(report: Mapping[str, Any], bound: float, what: str, remedy: str) -> None:
    """Refuse an export that answers otherwise than its adapter.

    Args:
        report: as `compare` gave it.
        bound: the least share of equal answers.
        what: the export.
        remedy: what to do about it.

    Raises:
        UserError: a share is below the bound.
    """
    if min(report["equal"].values()) < bound:
        raise UserError(
            f"{what}: does not answer as its adapter does; at least {bound:.1%} have to be equal. {describe(report)}. "
            f"Nothing was exported; what was there before is unchanged. {remedy}"
        )
