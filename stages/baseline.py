"""What an hour of classic work would give: TF-IDF with logistic regression, and always the most frequent label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from stages.common.errors import UserError, run_stage
from stages.common.params import load_params
from stages.common.predictions import write_predictions
from stages.common.progress import progress
from stages.common.tables import iter_batches, read_table, row_count

SPLITS = Path("data/splits")
PREDICTIONS = Path("data/predictions")
PARTS = ("validation", "test")
# Bounds the memory of the fit, which holds some twenty copies of labels x features numbers.
MOST_FEATURES = 100_000


def fit_tfidf(texts: Iterable[str], labels: Sequence[str]) -> Pipeline:
    """Fit logistic regression on the TF-IDF of single words and pairs; nothing in it is random.

    The settings are scikit-learn's but for: pairs of words, logarithmic term counts, single signs as words (emoji,
    "!" and one-letter words carry meaning, and a text of nothing else keeps a feature), no accents, and a weaker
    penalty (C=10), which suits rows of length 1.

    Args:
        texts: n texts, read once.
        labels: n labels, at least two different ones.
    """
    return make_pipeline(
        TfidfVectorizer(
            token_pattern=r"\w+|[^\w\s]",
            ngram_range=(1, 2),
            sublinear_tf=True,
            strip_accents="unicode",
            max_features=MOST_FEATURES,
            dtype=np.float32,
        ),
        LogisticRegression(C=10, max_iter=1000),
    ).fit(texts, labels)


def tfidf_probabilities(model: Pipeline, texts: Iterable[str], label_names: Sequence[str]) -> np.ndarray:
    """Probabilities of each text's labels, shape (n, k); 0 for a label that the model never saw."""
    seen = model.predict_proba(texts).astype(np.float64)
    probabilities = np.zeros((len(seen), len(label_names)))
    probabilities[:, [label_names.index(label) for label in model.classes_]] = seen
    # The features are float32; the sum is to be 1 in float64.
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def label_shares(labels: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """Each label's share of `labels`, shape (k,)."""
    return np.array([labels.count(name) for name in label_names]) / len(labels)


def read_labels(path: Path) -> list[str]:
    """The labels of the rows to train on.

    Raises:
        UserError: there are fewer than two different ones.
    """
    labels = read_table(path, ["label"])["label"].to_pylist()
    if len(set(labels)) < 2:
        raise UserError(
            f"{path}: {len(labels):,} rows with the labels {sorted(set(labels))}: nothing to tell apart. Two different "
            "labels are needed; look into the source's rows and ingest.columns.label."
        )
    return labels


def iter_texts(path: Path, what: str) -> Iterator[str]:
    """The texts of a split, one by one, with progress."""
    with progress(row_count(path), what) as bar:
        for batch in iter_batches(path, ["text"]):
            yield from batch["text"].to_pylist()
            bar.update(batch.num_rows)


def predict_part(part: str, model: Pipeline, shares: np.ndarray, label_names: list[str]) -> None:
    """Write both baselines' predictions for a part; of equally likely labels the first is predicted."""
    table = read_table(SPLITS / f"{part}.parquet", ["id", "label"])
    ids, labels = table["id"].to_pylist(), table["label"].to_pylist()
    texts = iter_texts(SPLITS / f"{part}.parquet", f"predicting {part}")
    answers = {
        "tfidf": tfidf_probabilities(model, texts, label_names),
        "majority": np.tile(shares, (len(ids), 1)),
    }
    for name, probabilities in answers.items():
        predictions = [label_names[index] for index in probabilities.argmax(axis=1)]
        write_predictions(PREDICTIONS / name / f"{part}.parquet", ids, labels, predictions, probabilities, label_names)


def main() -> None:
    """Write data/predictions/{tfidf,majority}/{validation,test}.parquet."""
    label_names = load_params("task").task.labels
    train = SPLITS / "train.parquet"
    labels = read_labels(train)
    shares = label_shares(labels, label_names)
    print(f"baseline: TF-IDF and logistic regression on {len(labels):,} rows", flush=True)
    model = fit_tfidf(iter_texts(train, "counting words"), labels)
    for part in PARTS:
        predict_part(part, model, shares, label_names)
    print(f"baseline: {model[0].idf_.size:,} words and pairs; most frequent is {label_names[shares.argmax()]!r}")


if __name__ == "__main__":
    run_stage(main)
