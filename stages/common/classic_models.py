"""The classic models that the baselines are made of: TF-IDF with logistic regression or retrieval, and shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from stages.common.progress import progress

# Bounds the memory of the fit, which holds some twenty copies of labels x features numbers.
MOST_FEATURES = 100_000
# Similarities held at a time while the nearest question is looked for; 12 bytes each.
MOST_SIMILARITIES = 20_000_000


def tfidf_vectorizer() -> TfidfVectorizer:
    """TF-IDF of single words and pairs, rows of length 1.

    The settings are scikit-learn's but for: pairs of words, logarithmic term counts, single signs as words (emoji,
    "!" and one-letter words carry meaning, and a text of nothing else keeps a feature), and no accents.
    """
    return TfidfVectorizer(
        token_pattern=r"\w+|[^\w\s]",
        ngram_range=(1, 2),
        sublinear_tf=True,
        strip_accents="unicode",
        max_features=MOST_FEATURES,
        dtype=np.float32,
    )


def logistic_regression() -> LogisticRegression:
    """scikit-learn's but for a weaker penalty (C=10), which suits rows of length 1; nothing in it is random."""
    return LogisticRegression(C=10, max_iter=1000)


# --- one label for each text ------------------------------------------------------------------------------------------


def fit_tfidf(texts: Iterable[str], labels: Sequence[str]) -> Pipeline:
    """Fit logistic regression on TF-IDF.

    Args:
        texts: n texts, read once.
        labels: n labels, at least two different ones.
    """
    return make_pipeline(tfidf_vectorizer(), logistic_regression()).fit(texts, labels)


def tfidf_probabilities(model: Pipeline, texts: Iterable[str], label_names: Sequence[str]) -> np.ndarray:
    """Probabilities of each text's labels, shape (n, k); 0 for a label that the model never saw."""
    seen = model.predict_proba(texts).astype(np.float64)
    probabilities = np.zeros((len(seen), len(label_names)))
    probabilities[:, [label_names.index(label) for label in model.classes_]] = seen
    # The features are float32; the sum is to be 1 in float64.
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def label_shares(labels: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """Each label's share of `labels`, shape (k,)."""
    counts = Counter(labels)
    return np.array([counts[name] for name in label_names]) / len(labels)


# --- several labels for each text -------------------------------------------------------------------------------------


class LabelSetModel(NamedTuple):
    """One-vs-rest: a regression for each of k labels, or None where train has the label never or always.

    Attributes:
        vectorizer: fitted on train.
        regressions: k of them.
        shares: each label's share of train, shape (k,).
    """

    vectorizer: TfidfVectorizer
    regressions: list[LogisticRegression | None]
    shares: np.ndarray


def fit_label_sets(texts: Iterable[str], truth: np.ndarray) -> LabelSetModel:
    """Fit a logistic regression for each label on the same TF-IDF.

    Args:
        texts: n texts, read once.
        truth: whether each label applies, bool of shape (n, k).
    """
    vectorizer = tfidf_vectorizer()
    features = vectorizer.fit_transform(texts)
    shares = truth.mean(axis=0)
    regressions = [
        logistic_regression().fit(features, applies) if 0 < share < 1 else None
        for applies, share in zip(truth.T, shares, strict=True)
    ]
    return LabelSetModel(vectorizer, regressions, shares)


def label_set_probabilities(model: LabelSetModel, texts: Iterable[str]) -> np.ndarray:
    """The probability that each label applies to each text, shape (n, k); a label without regression has its share."""
    features = model.vectorizer.transform(texts)
    probabilities = np.tile(model.shares, (features.shape[0], 1))
    for code, regression in enumerate(model.regressions):
        if regression is not None:
            probabilities[:, code] = regression.predict_proba(features)[:, 1]
    return probabilities


# --- texts ------------------------------------------------------------------------------------------------------------


def most_frequent(answers: pa.ChunkedArray) -> str:
    """The answer that most rows have, the first of equals."""
    counts = answers.value_counts()
    return counts.field("values")[int(np.argmax(counts.field("counts")))].as_py()


def nearest_rows(known: csr_matrix, asked: csr_matrix, similarities: int = MOST_SIMILARITIES) -> np.ndarray:
    """For each row of `asked` the row of `known` with the largest cosine, the first of equals.

    Args:
        known: m >= 1 rows of length 1, sparse.
        asked: n rows of length 1 (or 0), sparse.
        similarities: most cosines in memory at a time.

    Returns:
        Rows of `known`, int of shape (n,); -1 where none has anything in common.
    """
    step = max(1, similarities // known.shape[0])
    nearest = np.empty(asked.shape[0], np.int64)
    transposed = known.T.tocsr()
    with progress(len(nearest), "finding the nearest questions") as bar:
        for start in range(0, len(nearest), step):
            cosines = (asked[start : start + step] @ transposed).toarray()
            nearest[start : start + step] = np.where(cosines.max(axis=1) > 0, cosines.argmax(axis=1), -1)
            bar.update(len(cosines))
    return nearest
