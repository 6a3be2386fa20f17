"""The baselines learn what can be learned, give probabilities for every label, and are the same each time."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import baseline
from stages.common.errors import UserError
from stages.common.measuring.answers import read_answers

LABELS = ["bad", "good", "never seen"]


def write_splits(folder: Path, labels: list[str] | None = None) -> None:
    """Texts whose words give the label away; two thirds are good."""
    randomness = random.Random(0)
    words = {"good": ["fine", "great", "🎉"], "bad": ["awful", "poor", "💀"]}
    for part, rows in (("train", 90), ("validation", 12), ("test", 12)):
        chosen = labels or [("bad", "good", "good")[row % 3] for row in range(rows)]
        texts = [f"film {row} {randomness.choice(words[label])}" for row, label in enumerate(chosen)]
        table = pa.table({"id": [str(row) for row in range(len(chosen))], "text": texts, "label": chosen})
        (folder / "data/splits").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"data/splits/{part}.parquet")
    labels_yaml = f"{{kind: classification, labels: {LABELS}, label_descriptions: null, positive_label: null}}"
    (folder / "params.yaml").write_text(f"task: {labels_yaml}\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_splits(tmp_path)
    return tmp_path


def test_both_baselines_answer_every_row_in_order_with_probabilities_for_every_label(folder: Path) -> None:
    baseline.main()
    for part in ("validation", "test"):
        for name in ("tfidf", "majority"):
            answers = read_answers(Path(f"data/predictions/{name}/{part}.parquet"), LABELS)
            assert answers.ids == [str(row) for row in range(12)]
            assert answers.actual.tolist() == [0, 1, 1] * 4
            assert answers.probabilities is not None
            assert answers.probabilities[:, 2].tolist() == [0] * 12
            assert (answers.predicted == answers.probabilities.argmax(axis=1)).all()


def test_tfidf_learns_words_and_single_signs(folder: Path) -> None:
    baseline.main()
    answers = read_answers(Path("data/predictions/tfidf/test.parquet"), LABELS)
    assert (answers.predicted == answers.actual).all()
    model = baseline.fit_tfidf(["🎉", "💀", "🎉 !", "💀 ?"] * 3, ["good", "bad"] * 6)
    assert model.predict(["🎉", "💀", "😐"])[:2].tolist() == ["good", "bad"]


def test_the_majority_is_the_most_frequent_label_of_train_with_its_shares_as_probabilities(folder: Path) -> None:
    baseline.main()
    answers = read_answers(Path("data/predictions/majority/test.parquet"), LABELS)
    assert set(answers.predicted.tolist()) == {1}
    assert answers.probabilities is not None
    assert np.allclose(answers.probabilities, [1 / 3, 2 / 3, 0])


def test_the_first_of_equally_frequent_labels_is_the_majority() -> None:
    assert baseline.label_shares(["b", "a", "a", "b"], ["b", "a"]).argmax() == 0


def test_the_same_rows_give_the_same_bytes(folder: Path) -> None:
    def files() -> list[bytes]:
        return [path.read_bytes() for path in sorted((folder / "data/predictions").rglob("*.parquet"))]

    baseline.main()
    first = files()
    baseline.main()
    assert len(first) == 4
    assert files() == first


def test_one_label_alone_is_refused_readably(folder: Path) -> None:
    write_splits(folder, labels=["good"] * 12)
    with pytest.raises(UserError, match=r"train.parquet: 12 rows with the labels \['good'\]: nothing to tell apart"):
        baseline.main()
