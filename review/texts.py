"""Two generated answers to each question or conversation: metrics with paired intervals and tests, flipped rows."""

from __future__ import annotations

import numpy as np

from review.changes import Change, Comparison, Flips, Resampled
from review.labels import surest_first
from review.statistics import percentile_interval, resample_count, resampled_rows, sign_flip_p
from stages.common.measuring.answers import Texts
from stages.common.measuring.text_scores import RowScores, score_rows
from stages.common.schema.measuring import Evaluate
from stages.common.schema.task import GenerationTask

# Metrics that are means over rows, and what of `RowScores` they are means of, in the order of `_columns`.
MEANS = {
    "rouge_l": "rouge_l",
    "token_f1": "token_f1",
    "exact_match": "exact_match",
    "answer_words": "answer_words",
    "empty_rate": "empty",
}
# exp of more is no float64, as in text_scores.
MOST_NATS = 700.0


def metric_values(answers: Texts, task: GenerationTask, evaluate: Evaluate) -> dict[str, float]:
    """The metrics of `evaluate`, from its own scores of rows."""
    sums = _columns(answers, score_rows(answers.actual, answers.predicted)).sum(axis=0)
    return {name: float(value[0]) for name, value in sum_values(sums[None]).items()}


def compare(before: Texts, after: Texts, task: GenerationTask, evaluate: Evaluate) -> Comparison:
    """Compare answers to the same n >= 1 rows.

    Args:
        before: of the first side.
        after: of the second, for the same ids and references in the same order.
        task: question answering or chat.
        evaluate: number of resamples and seed.
    """
    scores = score_rows(before.actual, before.predicted)
    others = _scores_of_changed(before, after, scores)
    columns = [_columns(side, rows) for side, rows in ((before, scores), (after, others))]
    samples, resampled = resample_count(evaluate.bootstrap_samples, len(before.ids)), Resampled()
    for weights in resampled_rows(len(before.ids), samples, evaluate.seed):
        resampled.add(*(sum_values(weights @ side) for side in columns))
    differences = resampled.differences()
    values = [sum_values(side.sum(axis=0)[None]) for side in columns]
    p_values = _p_values(before, after, columns, evaluate.seed)
    return Comparison(
        {
            name: Change(
                float(value[0]),
                float(values[1][name][0]),
                percentile_interval(differences[name]),
                p_values.get(name),
                "permutation" if name in p_values else None,
            )
            for name, value in values[0].items()
            if name in values[1]
        },
        {},
        _flips(before, after, scores.token_f1, others.token_f1),
        same=before.predicted == after.predicted and _equal(before.log_likelihoods, after.log_likelihoods),
        resamples=samples,
    )


def same_tokens(before: Texts, after: Texts) -> bool:
    """Whether both models read the same tokens: with another tokenizer or token budget perplexities do not compare."""
    return _equal(before.tokens, after.tokens)


def sum_values(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of `text_scores` out of sums over the rows of many resamples.

    Args:
        sums: of `_columns`, shape (s, 8), or (s, 10) with log-likelihoods and tokens.
    """
    rows, four_grams, repeated = sums[:, :3].T
    values = {}
    if sums.shape[1] > 3 + len(MEANS):
        log_likelihood, tokens = sums[:, 3 + len(MEANS) :].T
        values["perplexity"] = np.exp(np.minimum(-log_likelihood / tokens, MOST_NATS))
    values |= dict(zip(MEANS, (sums[:, 3 : 3 + len(MEANS)] / rows[:, None]).T, strict=True))
    return values | {"repetition_rate": repeated / np.maximum(four_grams, 1)}


def _columns(answers: Texts, scores: RowScores) -> np.ndarray:
    columns = [np.ones(len(answers.ids)), scores.four_grams, scores.repeated]
    columns += [getattr(scores, name) for name in MEANS.values()]
    if answers.log_likelihoods is not None and answers.tokens is not None:
        columns += [answers.log_likelihoods, answers.tokens]
    return np.stack(columns, axis=1)


def _scores_of_changed(before: Texts, after: Texts, scores: RowScores) -> RowScores:
    """Scores of the second side; rows whose answer is the same are not scored again, which takes most of the time."""
    changed = [
        row for row, pair in enumerate(zip(before.predicted, after.predicted, strict=True)) if pair[0] != pair[1]
    ]
    found = score_rows([after.actual[row] for row in changed], [after.predicted[row] for row in changed])
    columns = [column.copy() for column in scores]
    for column, values in zip(columns, found, strict=True):
        column[changed] = values
    return RowScores(*columns)


def _p_values(before: Texts, after: Texts, columns: list[np.ndarray], seed: int) -> dict[str, float]:
    """Of means over rows; of perplexity, which is pooled, where its tokens are the same on both sides."""
    names, means = list(MEANS), slice(3, 3 + len(MEANS))
    differences = columns[1][:, means] - columns[0][:, means]
    if before.log_likelihoods is not None and after.log_likelihoods is not None and same_tokens(before, after):
        # Its logarithm is then a constant times the sum of the log-likelihoods.
        names.append("perplexity")
        differences = np.column_stack([differences, after.log_likelihoods - before.log_likelihoods])
    return dict(zip(names, sign_flip_p(differences, seed).tolist(), strict=True))


def _flips(before: Texts, after: Texts, token_f1: np.ndarray, others: np.ndarray) -> Flips:
    """Rows by how far their token F1 rose or fell: no answer is right or wrong."""
    moved = np.abs(others - token_f1)
    unlike = np.array([one != other for one, other in zip(before.predicted, after.predicted, strict=True)], dtype=bool)
    return Flips(
        surest_first(others > token_f1, moved),
        surest_first(others < token_f1, moved),
        int((unlike & (moved == 0)).sum()),
        token_f1,
        others,
        None,
    )


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
