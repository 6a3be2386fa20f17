"""The baselines learn what can be learned, give probabilities for every label, and are the same each time."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix, random_array
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import normalize

from stages import baseline
from stages.common.classic_models import (
    fit_label_sets,
    fit_tfidf,
    label_set_probabilities,
    label_shares,
    logistic_regression,
    most_frequent,
    nearest_rows,
    tfidf_vectorizer,
)
from stages.common.errors import UserError
from stages.common.labels import join_labels, split_labels
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
    write_task(folder, multi_label=False)


def write_task(folder: Path, multi_label: bool) -> None:
    labels = f"labels: {LABELS}, label_descriptions: null, positive_label: null"
    task = f"{{kind: classification, multi_label: {str(multi_label).lower()}, {labels}}}"
    (folder / "params.yaml").write_text(f"task: {task}\n", encoding="utf-8")


def write_part(folder: Path, part: str, texts: list[str], labels: list[str]) -> None:
    """A split of these texts with these labels or answers."""
    table = pa.table({"id": [f"{part} {row}" for row in range(len(texts))], "text": texts, "label": labels})
    (folder / "data/splits").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"data/splits/{part}.parquet")


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
    model = fit_tfidf(["🎉", "💀", "🎉 !", "💀 ?"] * 3, ["good", "bad"] * 6)
    assert model.predict(["🎉", "💀", "😐"])[:2].tolist() == ["good", "bad"]


def test_the_majority_is_the_most_frequent_label_of_train_with_its_shares_as_probabilities(folder: Path) -> None:
    baseline.main()
    answers = read_answers(Path("data/predictions/majority/test.parquet"), LABELS)
    assert set(answers.predicted.tolist()) == {1}
    assert answers.probabilities is not None
    assert np.allclose(answers.probabilities, [1 / 3, 2 / 3, 0])


def test_the_first_of_equally_frequent_labels_is_the_majority() -> None:
    assert label_shares(["b", "a", "a", "b"], ["b", "a"]).argmax() == 0


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


# --- several labels for a text ----------------------------------------------------------------------------------------


def write_label_sets(folder: Path) -> None:
    """Texts of "fine" and "awful" words, of both or of neither; nothing is ever "never seen"."""
    sets = [["bad"], ["good"], ["bad", "good"], []]
    words = {"good": "fine", "bad": "awful"}
    for part, rows in (("train", 80), ("validation", 8), ("test", 8)):
        chosen = [sets[row % 4] for row in range(rows)]
        texts = [" ".join(["film", str(row % 5), *(words[name] for name in names)]) for row, names in enumerate(chosen)]
        write_part(folder, part, texts, [join_labels(names) for names in chosen])
    write_task(folder, multi_label=True)


def test_sets_of_labels_are_learned_label_by_label(folder: Path) -> None:
    write_label_sets(folder)
    baseline.main()
    found = pq.read_table("data/predictions/tfidf/test.parquet").to_pydict()
    assert found["prediction"] == found["label"]
    assert split_labels(found["label"][2]) == ["bad", "good"]
    assert found["probability.never seen"] == [0] * 8
    majority = pq.read_table("data/predictions/majority/validation.parquet").to_pydict()
    # Each of the two is half of train: from 0.5 on a label is given.
    assert majority["probability.bad"] == [0.5] * 8
    assert majority["prediction"] == ['["bad", "good"]'] * 8


def test_probabilities_of_sets_are_those_of_scikit_learns_one_vs_rest() -> None:
    randomness = np.random.default_rng(0)
    truth = randomness.random((60, 3)) < [0.5, 0.2, 0.8]
    texts = [
        " ".join(f"w{code}" for code in np.flatnonzero(row)) + f" and {place % 7}" for place, row in enumerate(truth)
    ]
    model = fit_label_sets(texts, truth)
    features = tfidf_vectorizer().fit_transform(texts)
    expected = OneVsRestClassifier(logistic_regression()).fit(features, truth.astype(int)).predict_proba(features)
    assert np.allclose(label_set_probabilities(model, texts), expected, atol=1e-6)


def test_a_label_that_train_always_has_gets_its_share() -> None:
    model = fit_label_sets(["a b", "a c", "b c"], np.array([[True, True], [True, False], [True, True]]))
    assert label_set_probabilities(model, ["a", "d"])[:, 0].tolist() == [1, 1]


def test_sets_of_which_nothing_can_be_learned_are_refused_readably(folder: Path) -> None:
    write_label_sets(folder)
    write_part(folder, "train", ["a", "b"], ['["bad"]', '["bad"]'])
    with pytest.raises(UserError, match=r"train.parquet: 2 rows, and every label applies to all of them or to none"):
        baseline.main()


# --- texts ------------------------------------------------------------------------------------------------------------


def write_questions(folder: Path) -> None:
    train = {
        "what is a cold": "a virus", "how is a cold treated": "with rest", "what is a flu": "a virus",
        "is tea good for a cold": "yes",
    }  # fmt: skip
    write_part(folder, "train", list(train), list(train.values()))
    for part in ("validation", "test"):
        write_part(folder, part, ["how is the flu treated?", "is tea good", "zzz"], ["rest", "yes", "no"])
    (folder / "params.yaml").write_text("task: {kind: question_answering}\n", encoding="utf-8")


def test_questions_get_the_answer_of_the_nearest_one_and_the_most_frequent_answer(folder: Path) -> None:
    write_questions(folder)
    baseline.main()
    for part in ("validation", "test"):
        found = pq.read_table(f"data/predictions/tfidf/{part}.parquet").to_pydict()
        assert found["id"] == [f"{part} {row}" for row in range(3)]
        assert found["label"] == ["rest", "yes", "no"]
        # "zzz" has no word in common with any question: the most frequent answer is the best guess.
        assert found["prediction"] == ["with rest", "yes", "a virus"]
        assert found["reference_log_likelihood"] == found["reference_tokens"] == [None] * 3
        majority = pq.read_table(f"data/predictions/majority/{part}.parquet").to_pydict()
        assert majority["prediction"] == ["a virus"] * 3


def test_of_a_large_train_the_nearest_question_is_looked_for_among_evenly_spaced_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(folder)
    monkeypatch.setattr(baseline, "MOST_KNOWN_QUESTIONS", 2)
    baseline.main()
    # The first and the last of four; "with rest" is the answer of the second.
    found = pq.read_table("data/predictions/tfidf/test.parquet")["prediction"].to_pylist()
    assert found == ["a virus", "yes", "a virus"]
    assert capsys.readouterr().out.endswith("of 4 questions; the nearest was looked for among 2 of them\n")


def test_the_same_questions_give_the_same_bytes(folder: Path) -> None:
    write_questions(folder)
    contents = []
    for _ in range(2):
        baseline.main()
        contents.append([path.read_bytes() for path in sorted((folder / "data/predictions").rglob("*.parquet"))])
    assert len(contents[0]) == 4
    assert contents[0] == contents[1]


def test_questions_without_a_row_to_learn_from_are_refused_readably(folder: Path) -> None:
    write_questions(folder)
    write_part(folder, "train", [], [])
    with pytest.raises(UserError, match=r"train.parquet: has no rows to learn from"):
        baseline.main()


def test_the_nearest_row_is_that_of_all_cosines_whatever_is_in_memory_at_a_time() -> None:
    generator = np.random.default_rng(0)
    known, asked = (
        normalize(csr_matrix(random_array((rows, 30), density=0.1, rng=generator, dtype=np.float32)))
        for rows in (50, 23)
    )
    cosines = cosine_similarity(asked, known)
    expected = np.where(cosines.max(axis=1) > 0, cosines.argmax(axis=1), -1)
    for similarities in (1, 120, 10_000):
        assert nearest_rows(known, asked, similarities).tolist() == expected.tolist()


def test_the_first_of_equally_near_questions_and_of_equally_frequent_answers_wins() -> None:
    known = tfidf_vectorizer().fit_transform(["b", "a", "a"])
    assert nearest_rows(known, known).tolist() == [0, 1, 1]
    assert most_frequent(pa.chunked_array([["c", "b"], ["b", "c", "a"]])) == "c"
    assert most_frequent(pa.chunked_array([["c"], ["b"]])) == "c"
