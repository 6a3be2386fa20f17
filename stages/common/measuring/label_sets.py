"""Numbers out of predicted sets of labels: pure functions over arrays, with scikit-learn's definitions."""

from __future__ import annotations

import numpy as np

# Numbers that one chunk of resamples holds at a time: 64 MB.
CHUNK = 2**24


def set_scores(actual: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """How good the sets are; ratios without rows are 0, but a row without labels and answers has a sample F1 of 1.

    - `accuracy`: rows whose whole set is right.
    - `f1_samples`: mean over rows of 2 |actual and predicted| / (|actual| + |predicted|).
    - `hamming_loss`: wrong decisions, of n * k.

    Args:
        actual: whether each label applies, bool of shape (n, k), n >= 1.
        predicted: whether it was predicted, bool of shape (n, k).
    """
    correct, support, answered = _counts(actual, predicted)
    sizes = actual.sum(axis=1) + predicted.sum(axis=1)
    shared = (actual & predicted).sum(axis=1)
    return {
        "accuracy": float((actual == predicted).all(axis=1).mean()),
        "f1_micro": float(_ratio(2 * correct.sum(), support.sum() + answered.sum())),
        "f1_macro": float(_ratio(2 * correct, support + answered).mean()),
        "f1_samples": float(np.divide(2 * shared, sizes, out=np.ones(len(actual)), where=sizes > 0).mean()),
        "precision_macro": float(_ratio(correct, answered).mean()),
        "recall_macro": float(_ratio(correct, support).mean()),
        "hamming_loss": float((actual != predicted).mean()),
    }


def scores_of_labels(actual: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Precision, recall, F1 and support of each label, and its average precision where any row has it."""
    from sklearn.metrics import average_precision_score  # as in `ranking_scores`

    correct, support, answered = _counts(actual, predicted)
    columns = {
        "precision": _ratio(correct, answered),
        "recall": _ratio(correct, support),
        "f1": _ratio(2 * correct, support + answered),
    }
    scores = []
    for code in range(actual.shape[1]):
        found: dict[str, float] = {name: float(values[code]) for name, values in columns.items()}
        found["support"] = int(support[code])
        if support[code]:
            found["pr_auc"] = float(average_precision_score(actual[:, code], probabilities[:, code]))
        scores.append(found)
    return scores


def binary_log_loss(actual: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over rows and labels of the negative log-probability of what is true, in nats.

    Probabilities are clipped to [eps, 1 - eps] with float64's eps of 2.2e-16, as in scikit-learn.
    """
    epsilon = np.finfo(np.float64).eps
    of_truth = np.where(actual, probabilities, 1 - probabilities)
    return float(-np.log(np.clip(of_truth, epsilon, 1 - epsilon)).mean())


def bootstrap_set_intervals(actual: np.ndarray, predicted: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    """95 % percentile intervals of accuracy and macro-F1 over resampled rows (Efron 1979).

    A resample is how often each row was drawn, so that all counts of many resamples are one product of matrices. With
    one seed all predictors of a part are measured on the same resamples.

    Args:
        actual: whether each label applies, bool of shape (n, k), n >= 1.
        predicted: whether it was predicted, bool of shape (n, k).
        samples: number of resamples.
        seed: of the draws.

    Returns:
        accuracy_low, accuracy_high, f1_macro_low, f1_macro_high.
    """
    rows, labels = actual.shape
    right = (actual == predicted).all(axis=1, keepdims=True)
    # In float32 counts are exact up to 2^24.
    exact = np.float32 if rows < 2**24 else np.float64
    counted = np.concatenate([actual & predicted, actual, predicted, right], axis=1).astype(exact)
    generator, values = np.random.default_rng(seed), []
    chunk = max(1, CHUNK // rows)
    for start in range(0, samples, chunk):
        drawn = np.empty((min(chunk, samples - start), rows), exact)
        for weights in drawn:
            weights[:] = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        counts = (drawn @ counted).astype(np.float64)
        correct, support, answered = np.split(counts[:, :-1], [labels, 2 * labels], axis=1)
        values.append(np.stack([counts[:, -1] / rows, _ratio(2 * correct, support + answered).mean(axis=1)], axis=1))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975], axis=0)
    return {
        f"{name}_{end}": float(edge[index])
        for index, name in enumerate(("accuracy", "f1_macro"))
        for end, edge in (("low", low), ("high", high))
    }


def _counts(actual: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct answers, rows and answers of each label."""
    return (actual & predicted).sum(axis=0), actual.sum(axis=0), predicted.sum(axis=0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=np.asarray(denominator) != 0)
