"""What an hour of classic work would give: TF-IDF with logistic regression, and always the most frequent label.

With several labels for a text, a regression for each label, and each label's share. Where answers are texts, the answer
to the nearest question of train by TF-IDF, and always the most frequent answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.pipeline import Pipeline

from stages.common.classic_models import (
    fit_label_sets,
    fit_tfidf,
    label_set_probabilities,
    label_shares,
    most_frequent,
    nearest_rows,
    tfidf_probabilities,
    tfidf_vectorizer,
)
from stages.common.errors import UserError, run_stage
from stages.common.labels import join_labels, split_labels
from stages.common.params import load_params
from stages.common.predictions import write_answers, write_predictions
from stages.common.progress import progress
from stages.common.schema.task import GenerationTask
from stages.common.tables import iter_batches, read_table, row_count

SPLITS = Path("data/splits")
PREDICTIONS = Path("data/predictions")
PARTS = ("validation", "test")
# Each question is compared with as many of train, lest the time grow with the square of the rows.
MOST_KNOWN_QUESTIONS = 100_000


# --- one label for each text ------------------------------------------------------------------------------------------


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


def predict_part(part: str, model: Pipeline, shares: np.ndarray, label_names: list[str]) -> None:
    """Write both baselines' predictions for a part; of equally likely labels the first is predicted."""
    ids, labels = read_rows(part)
    texts = iter_texts(SPLITS / f"{part}.parquet", f"predicting {part}")
    answers = {
        "tfidf": tfidf_probabilities(model, texts, label_names),
        "majority": np.tile(shares, (len(ids), 1)),
    }
    for name, probabilities in answers.items():
        predictions = [label_names[index] for index in probabilities.argmax(axis=1)]
        write_predictions(PREDICTIONS / name / f"{part}.parquet", ids, labels, predictions, probabilities, label_names)


def label_baselines(label_names: list[str]) -> None:
    """Fit both baselines for tasks with one label for each text, and predict."""
    train = SPLITS / "train.parquet"
    labels = read_labels(train)
    shares = label_shares(labels, label_names)
    print(f"baseline: TF-IDF and logistic regression on {len(labels):,} rows", flush=True)
    model = fit_tfidf(iter_texts(train, "counting words"), labels)
    for part in PARTS:
        predict_part(part, model, shares, label_names)
    print(f"baseline: {model[0].idf_.size:,} words and pairs; most frequent is {label_names[shares.argmax()]!r}")


# --- several labels for each text -------------------------------------------------------------------------------------


def read_label_sets(path: Path, label_names: Sequence[str]) -> np.ndarray:
    """Whether each label applies to each row, bool of shape (n, k).

    Raises:
        UserError: there is no label that applies to some rows and not to others.
    """
    cells = read_table(path, ["label"])["label"].to_pylist()
    truth = np.array([[name in applying for name in label_names] for applying in map(split_labels, cells)], bool)
    if not len(truth) or not (truth.any(axis=0) & ~truth.all(axis=0)).any():
        raise UserError(
            f"{path}: {len(truth):,} rows, and every label applies to all of them or to none: nothing to tell apart. "
            "Look into the source's rows and ingest.columns.label."
        )
    return truth


def label_set_baselines(label_names: list[str]) -> None:
    """Fit both baselines for tasks with several labels for each text, and predict the labels of at least 0.5."""
    train = SPLITS / "train.parquet"
    truth = read_label_sets(train, label_names)
    print(f"baseline: TF-IDF and {truth.shape[1]} logistic regressions on {len(truth):,} rows", flush=True)
    model = fit_label_sets(iter_texts(train, "counting words"), truth)
    for part in PARTS:
        ids, labels = read_rows(part)
        texts = iter_texts(SPLITS / f"{part}.parquet", f"predicting {part}")
        answers = {
            "tfidf": label_set_probabilities(model, texts),
            "majority": np.tile(model.shares, (len(ids), 1)),
        }
        for name, probabilities in answers.items():
            chosen = [[label_names[code] for code in np.flatnonzero(row)] for row in probabilities >= 0.5]
            target = PREDICTIONS / name / f"{part}.parquet"
            predictions = [join_labels(row) for row in chosen]
            write_predictions(target, ids, labels, predictions, probabilities, label_names, multi_label=True)
    print(f"baseline: {model.vectorizer.idf_.size:,} words and pairs for {len(label_names)} labels")


# --- texts ------------------------------------------------------------------------------------------------------------


def answer_baselines() -> None:
    """Answer each question as the nearest one of train was answered, and with the most frequent answer.

    Of a larger train, the nearest is looked for among `MOST_KNOWN_QUESTIONS` of its rows, evenly spaced.
    """
    train = SPLITS / "train.parquet"
    answers = read_table(train, ["label"])["label"]
    if not len(answers):
        raise UserError(f"{train}: has no rows to learn from. Lower split.validation_share and split.test_share.")
    print(f"baseline: TF-IDF of {len(answers):,} questions", flush=True)
    vectorizer, usual = tfidf_vectorizer(), most_frequent(answers)
    places = np.linspace(0, len(answers) - 1, min(len(answers), MOST_KNOWN_QUESTIONS)).round().astype(np.int64)
    known = vectorizer.fit_transform(iter_texts(train, "counting words"))[places]
    for part in PARTS:
        ids, references = read_rows(part)
        questions = vectorizer.transform(iter_texts(SPLITS / f"{part}.parquet", f"answering {part}"))
        nearest = nearest_rows(known, questions)
        found = [usual if row < 0 else answers[int(places[row])].as_py() for row in nearest]
        write_answers(PREDICTIONS / "tfidf" / f"{part}.parquet", ids, references, found, None, None)
        write_answers(PREDICTIONS / "majority" / f"{part}.parquet", ids, references, [usual] * len(ids), None, None)
    print(
        f"baseline: {vectorizer.idf_.size:,} words and pairs of {len(answers):,} questions; the nearest was looked for "
        f"among {len(places):,} of them"
    )


# --- all kinds --------------------------------------------------------------------------------------------------------


def read_rows(part: str) -> tuple[list[str], list[str]]:
    """Ids and labels (or references) of a split."""
    table = read_table(SPLITS / f"{part}.parquet", ["id", "label"])
    return table["id"].to_pylist(), table["label"].to_pylist()


def iter_texts(path: Path, what: str) -> Iterator[str]:
    """The texts of a split, one by one, with progress."""
    with progress(row_count(path), what) as bar:
        for batch in iter_batches(path, ["text"]):
            yield from batch["text"].to_pylist()
            bar.update(batch.num_rows)


def main() -> None:
    """Write data/predictions/{tfidf,majority}/{validation,test}.parquet."""
    task = load_params("task").task
    if isinstance(task, GenerationTask):
        answer_baselines()
    elif task.multi_label:
        label_set_baselines(task.labels)
    else:
        label_baselines(task.labels)


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
