"""The stage that makes train, validation and test: shares, groups, published parts and leakage."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages import format_prompts, split
from stages.common.contents import count_parts, read_contents
from stages.common.errors import UserError
from stages.common.labels import join_labels
from stages.common.leakage import DROPPED, PARTS, TEST, TRAIN, VALIDATION, Rows, drop_leaks
from stages.common.schema.prompts import Split
from stages.common.schema.task import ClassificationTask, GenerationTask
from stages.common.strata import strata_of
from stages.common.tables import open_table, table_metadata
from stages.common.text_keys import group_key
from stages.split import assign_parts

LABELS = ["negative", "neutral", "positive"]
PARAMS = {"seed": 1, "validation_share": 0.1, "test_share": 0.2, "leakage": "error"}


def parameters(**changes: Any) -> Split:
    return Split.model_validate({**PARAMS, **changes})


def make_rows(
    labels: Sequence[int | set[int]],
    groups: list[Any] | None = None,
    texts: list[Any] | None = None,
    published: list[int] | None = None,
    n_labels: int | None = None,
) -> Rows:
    """Every row its own group and text, and labels up to the last one that there is, unless said otherwise."""
    own = list(range(len(labels)))
    keys = [np.array([int(group_key(f"k{key}"), 16) for key in column or own], np.uint64) for column in (groups, texts)]
    sets = [found if isinstance(found, set) else {found} for found in labels]
    flags = np.zeros((len(sets), n_labels or 1 + max((max(found, default=0) for found in sets), default=0)), np.bool_)
    for row, found in enumerate(sets):
        flags[row, list(found)] = True
    return Rows(strata_of(flags), flags, keys[0], keys[1], None if published is None else np.array(published))


def make_texts(count: int, groups: list[Any] | None = None) -> Rows:
    """Rows without labels, whose answers are texts."""
    rows = make_rows([0] * count, groups)
    return rows._replace(labels=rows.labels[:, :0], strata=strata_of(rows.labels[:, :0]))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_every_part_has_its_share_of_the_rows_and_of_every_label() -> None:
    labels = [0] * 500 + [1] * 300 + [2] * 200
    parts = assign_parts(make_rows(labels), LABELS, parameters())
    assert np.bincount(parts).tolist() == [700, 100, 200]
    assert np.bincount(np.array(labels)[parts == VALIDATION]).tolist() == [50, 30, 20]
    assert np.bincount(np.array(labels)[parts == TEST]).tolist() == [100, 60, 40]


def test_a_share_is_not_rounded_up_because_of_floating_point() -> None:
    # 0.07 * 100 = 7.000000000000001
    parts = assign_parts(make_rows([0, 1] * 50), LABELS[:2], parameters(test_share=0.07))
    assert (parts == TEST).sum() == 7


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    labels = [0, 1] * 100
    rows = make_rows(labels)
    parts = assign_parts(rows, LABELS[:2], parameters())
    assert (assign_parts(rows, LABELS[:2], parameters()) == parts).all()
    assert (assign_parts(rows, LABELS[:2], parameters(seed=2)) != parts).any()
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = Rows(rows.strata[order], rows.labels[order], rows.groups[order], rows.texts[order], None)
    assert (assign_parts(shuffled, LABELS[:2], parameters()) == parts[order]).all()


def test_no_group_is_in_two_parts_whatever_its_rows_say() -> None:
    generator = random.Random(0)
    groups = [generator.randrange(300) for _ in range(2_000)]
    labels = [generator.choices([0, 1, 2], [6, 3, 1])[0] for _ in groups]
    parts = assign_parts(make_rows(labels, groups), LABELS, parameters())
    assert set(parts) == {TRAIN, VALIDATION, TEST}
    assert max(Counter(group for group, _ in set(zip(groups, parts.tolist(), strict=True))).values()) == 1


def test_groups_are_stratified_by_their_most_frequent_label_and_ties_go_to_the_first() -> None:
    # Of 100 groups, 50 are mostly label 1 (2 of 3 rows), 50 tie between 0 and 1.
    labels = [1, 0, 1] * 50 + [1, 0] * 50
    groups = [index // 3 for index in range(150)] + [50 + index // 2 for index in range(100)]
    parts = assign_parts(make_rows(labels, groups), LABELS[:2], parameters())
    in_test = {group for group, part in zip(groups, parts, strict=True) if part == TEST}
    assert (len(in_test), sum(group < 50 for group in in_test)) == (20, 10)


def test_a_label_that_is_hardly_ever_a_groups_most_frequent_one_is_no_obstacle() -> None:
    # 30 groups with one row in ten of label 1, and one group of nothing else: it cannot be stratified on its own.
    labels = ([0] * 9 + [1]) * 30 + [1] * 10
    parts = assign_parts(make_rows(labels, [index // 10 for index in range(310)]), LABELS[:2], parameters())
    assert np.bincount(parts).tolist() == [200, 40, 70]


# --- several labels, and none -----------------------------------------------------------------------------------------


def labelled(labels: list[str] = LABELS[:2], multi_label: bool = False) -> ClassificationTask:
    positive = labels[0] if len(labels) == 2 and not multi_label else None
    return ClassificationTask(
        kind="classification",
        labels=labels,
        multi_label=multi_label,
        label_descriptions=None,
        positive_label=positive,
    )


def test_rows_with_several_labels_are_stratified_by_the_rarest_of_them() -> None:
    # 500 rows of label 0, of which 100 have 1 too and 20 have 2 too; 80 have 1 alone; 100 have none.
    labels = [{0}] * 380 + [{0, 1}] * 100 + [{0, 2}] * 20 + [{1}] * 80 + [set()] * 100
    rows = make_rows(labels)
    assert np.bincount(rows.strata).tolist() == [380, 180, 20, 100]
    parts = assign_parts(rows, LABELS, parameters())
    counts = [np.bincount(rows.strata[parts == part], minlength=4).tolist() for part in range(3)]
    # A fifth (a tenth) of 380, 180, 20 and 100.
    assert counts == [[266, 126, 14, 70], [38, 18, 2, 10], [76, 36, 4, 20]]
    split.check_every_part(parts, rows, labelled(LABELS, True), parameters())


def test_of_two_equally_rare_labels_the_first_counts_as_the_rarest() -> None:
    assert strata_of(np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]], np.bool_)).tolist() == [0, 1, 0, 3]


def test_with_several_labels_each_part_needs_texts_with_and_without_each() -> None:
    published = [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST]
    task = labelled(multi_label=True)
    for labels, message in (
        ([{0}, {1}, {0}, {1}, {0}, set()], r"'neutral' has 2 groups .* none of them is in test; .* each have it"),
        (
            [{0}, {1}, {0, 1}, {0}, {0}, {1}],
            r"'negative' is lacking in 2 groups .* in validation; .* a text without it",
        ),
    ):
        rows = make_rows(labels, published=published)
        with pytest.raises(UserError, match=message):
            split.check_every_part(np.array(published), rows, task, parameters())
    rows = make_rows([{0}, {1}] * 3, published=published)
    split.check_every_part(np.array(published), rows, task, parameters())


def test_without_labels_whole_groups_are_drawn_by_the_seed() -> None:
    groups = [index // 3 for index in range(300)]
    rows = make_texts(300, groups)
    parts = assign_parts(rows, [], parameters())
    assert np.bincount(parts).tolist() == [210, 30, 60]
    assert max(Counter(group for group, _ in set(zip(groups, parts.tolist(), strict=True))).values()) == 1
    assert (assign_parts(rows, [], parameters()) == parts).all()
    assert (assign_parts(rows, [], parameters(seed=2)) != parts).any()
    order = np.random.default_rng(0).permutation(300)
    shuffled = Rows(rows.strata[order], rows.labels[order], rows.groups[order], rows.texts[order], None)
    assert (assign_parts(shuffled, [], parameters()) == parts[order]).all()
    split.check_every_part(parts, rows, GenerationTask(kind="chat"), parameters())


def test_too_few_groups_without_labels_are_an_error() -> None:
    for count in (1, 2):
        with pytest.raises(UserError, match=r"groups are too few to take 1 for \w+ and leave train some\. Lower"):
            assign_parts(make_texts(count), [], parameters())
    assert sorted(assign_parts(make_texts(3), [], parameters())) == [TRAIN, VALIDATION, TEST]


def test_a_part_that_leakage_empties_is_an_error_without_labels_too() -> None:
    parts = np.array([TRAIN, TRAIN, TEST, DROPPED])
    with pytest.raises(UserError, match="no rows are left in validation"):
        split.check_every_part(parts, make_texts(4), GenerationTask(kind="question_answering"), parameters())


def test_one_label_for_each_text_gives_the_parts_that_it_always_gave() -> None:
    # SHA-256 of the parts as they were before tasks had several labels or none (commit 9997bec).
    generator = random.Random(7)
    groups = [generator.randrange(900) for _ in range(3_000)]
    labels = [generator.choices([0, 1, 2], [6, 3, 1])[0] for _ in groups]
    digests = [
        hashlib.sha256(assign_parts(rows, LABELS, parameters()).astype("<i8").tobytes()).hexdigest()[:16]
        for rows in (make_rows(labels), make_rows(labels, groups))
    ]
    assert digests == ["cfa15057863e3339", "d6afea633509fa67"]


# --- published splits -------------------------------------------------------------------------------------------------


def test_published_parts_stay_and_validation_comes_out_of_train() -> None:
    published = [TRAIN] * 300 + [TEST] * 100
    labels = [0, 1] * 200
    parts = assign_parts(make_rows(labels, published=published), LABELS[:2], parameters())
    assert set(parts[300:]) == {TEST}
    # A tenth of all 400.
    assert np.bincount(parts[:300]).tolist() == [260, 40]
    assert np.bincount(np.array(labels)[parts == VALIDATION]).tolist() == [20, 20]


def test_a_published_train_alone_gives_both_other_parts() -> None:
    rows = make_rows([0, 1] * 100)
    alone = assign_parts(rows._replace(published=np.zeros(200, np.int64)), LABELS[:2], parameters())
    assert (alone == assign_parts(rows, LABELS[:2], parameters())).all()


def test_three_published_parts_stay_as_they_are() -> None:
    published = [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST]
    parts = assign_parts(make_rows([0, 1] * 3, published=published), LABELS[:2], parameters())
    assert parts.tolist() == published


def test_a_published_split_without_train_is_an_error() -> None:
    with pytest.raises(UserError, match="no train rows"):
        assign_parts(make_rows([0, 1] * 50, published=[TEST] * 100), LABELS[:2], parameters())


# --- too few ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "has"), [(0, "0 groups"), (2, "2 groups")])
def test_a_label_with_too_few_groups_is_named_with_the_remedy(count: int, has: str) -> None:
    with pytest.raises(UserError, match=f"'positive' has {has} .* about 10 are needed .* split.validation_share"):
        assign_parts(make_rows([0] * 50 + [1] * 50 + [2] * count, n_labels=3), LABELS, parameters())


def test_a_label_that_some_part_lacks_is_named() -> None:
    rows = make_rows([0, 1, 0, 1, 0, 0], published=[TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST])
    parts = assign_parts(rows, LABELS[:2], parameters())
    with pytest.raises(UserError, match=r"'neutral' has 2 groups .* none of them is in test"):
        split.check_every_part(parts, rows, labelled(), parameters())


def test_too_few_groups_for_one_of_each_label_are_an_error() -> None:
    labels = [0, 1, 2] * 10
    with pytest.raises(UserError, match=r"split\.validation_share: 24 groups are too few to take 1 for validation"):
        assign_parts(make_rows(labels), LABELS, parameters(validation_share=0.03))


def test_a_small_class_that_a_large_first_part_uses_up_is_an_error() -> None:
    labels = [0] * 100 + [1] * 100 + [2] * 3
    for test_share, validation_share in ((0.6, 0.2), (0.5, 0.2), (0.7, 0.1)):
        shares = parameters(test_share=test_share, validation_share=validation_share)
        with pytest.raises(UserError, match="groups are too few"):
            assign_parts(make_rows(labels), LABELS, shares)


# --- leakage ----------------------------------------------------------------------------------------------------------


def test_a_text_in_two_parts_is_dropped_from_the_earlier_one() -> None:
    parts = np.array([TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TRAIN])
    #  t: in test too; v: in validation too; a row that validation loses to test takes nothing out of train by group.
    rows = make_rows([0] * 6, texts=["t", "v", "v", "t", "t", "own"], groups=["a", "b", "c", "d", "e", "d"])
    clean, leaks = drop_leaks(parts, rows)
    assert clean.tolist() == [DROPPED, DROPPED, VALIDATION, DROPPED, TEST, TRAIN]
    assert [tuple(leak) for leak in leaks] == [
        (0, TRAIN, 4, TEST),
        (1, TRAIN, 2, VALIDATION),
        (3, VALIDATION, 4, TEST),
    ]


def test_a_group_in_two_published_parts_is_leakage_too() -> None:
    parts = np.array([TRAIN, TRAIN, VALIDATION, TEST])
    clean, leaks = drop_leaks(parts, make_rows([0] * 4, groups=["a", "b", "c", "a"]))
    assert clean.tolist() == [DROPPED, TRAIN, VALIDATION, TEST]
    assert len(leaks) == 1


def test_no_rows_have_no_leaks() -> None:
    assert drop_leaks(np.array([], np.int64), make_rows([]))[1] == []


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with parameters, in which the stage runs."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    set_params()


SINGLE_LABEL = labelled(LABELS).model_dump()
FORMAT: dict[str, Any] = {"kind": "classification", "labels": LABELS, "terminator_ids": [3], "max_length_tokens": 96}
BEGIN = 0


def set_params(task: dict[str, Any] = SINGLE_LABEL, **changes: Any) -> None:
    # JSON is YAML.
    Path("params.yaml").write_text(json.dumps({"task": task, "split": {**PARAMS, **changes}}))


def save_prompts(rows: list[dict[str, Any]], prompt_format: dict[str, Any] = FORMAT) -> None:
    metadata = {"prompt_format": FORMAT | prompt_format, "begin_id": BEGIN}
    with open_table("data/prompts.parquet", format_prompts.SCHEMA, metadata) as table:
        for row in rows:
            table.add(row)


def make_prompts(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{index}",
            "text": f"text number {index}",
            "label": LABELS[index % 3],
            "group": group_key(f"text number {index}"),
            "split": None,
            "slice": None,
            "prompt": f"p{index}",
            "completion": " x",
            "prompt_ids": [index, 1],
            "prompt_answer_mask": None,
            "completion_ids": [3],
            "shortened": False,
        }
        for index in range(count)
    ]


@pytest.mark.usefixtures("workspace")
def test_the_parts_hold_all_rows_in_their_order_with_the_prompt_format(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = make_prompts(12_000)
    save_prompts(prompts)
    split.main()
    seen = []
    for part in PARTS:
        path = f"data/splits/{part}.parquet"
        rows = pq.read_table(path).to_pylist()
        positions = [int(row["id"][1:]) for row in rows]
        assert positions == sorted(positions)
        assert rows == [{name: prompts[index][name] for name in split.COLUMNS} for index in positions]
        assert table_metadata(path, "prompt_format") == FORMAT
        seen += positions
    assert sorted(seen) == list(range(12_000))
    report = json.loads(Path("data/reports/split.json").read_text())
    assert [report[part]["rows"] for part in PARTS] == [8_400, 1_200, 2_400]
    assert report["test"] == {"rows": 2_400, "groups": 2_400, "labels": dict.fromkeys(LABELS, 800)}
    assert (report["published"], report["dropped"], report["dropped_ids"]) == (False, 0, [])
    contents = read_contents(split.CONTENTS, split.SPLITS, BEGIN)
    assert contents == count_parts(split.SPLITS, FORMAT, BEGIN)
    assert contents is not None
    assert contents["test"].labels == dict.fromkeys(LABELS, 800)
    assert "split: train 8,400 rows (negative 33.3%, neutral 33.3%, positive 33.3%)" in capsys.readouterr().out


@pytest.mark.usefixtures("workspace")
def test_leakage_stops_the_stage_or_costs_train_its_rows() -> None:
    prompts = make_prompts(90)
    for index, row in enumerate(prompts):
        row["split"] = PARTS[index // 30]
    # The same words as rows of test and of validation, but for case and punctuation; groups as a column gave them.
    prompts[5] |= {"text": "TEXT, number 65!", "label": "positive"}
    prompts[6] |= {"text": "text number 31"}
    save_prompts(prompts)
    with pytest.raises(
        UserError, match=r"2 rows [^$]*r5 \(train\) and r65 \(test\)\s+r6 \(train\) and r31 \(val"
    ) as error:
        split.main()
    assert "split.leakage to drop" in str(error.value)
    assert not Path("data/splits").exists()
    set_params(leakage="drop")
    split.main()
    assert [pq.read_table(f"data/splits/{part}.parquet").num_rows for part in PARTS] == [28, 30, 30]
    report = json.loads(Path("data/reports/split.json").read_text())
    assert (report["published"], report["dropped"], report["dropped_ids"]) == (True, 2, ["r5", "r6"])


@pytest.mark.usefixtures("workspace")
def test_a_split_column_with_holes_is_an_error_that_names_a_row() -> None:
    prompts = make_prompts(60)
    for row in prompts[:50]:
        row["split"] = "train"
    save_prompts(prompts)
    with pytest.raises(UserError, match="10 of 60 rows have no published split, the first is 'r50'"):
        split.main()


@pytest.mark.usefixtures("workspace")
def test_several_labels_are_counted_each_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [["negative"], ["negative", "neutral"], ["positive"], []]
    prompts = make_prompts(400)
    for index, row in enumerate(prompts):
        row |= {"label": join_labels(cells[index % 4]), "completion": None, "completion_ids": None}
    set_params(labelled(LABELS, True).model_dump())
    save_prompts(prompts, {"kind": "multi_label", "completions": {"negative: yes": {"ids": [3]}}})
    split.main()
    report = json.loads(Path("data/reports/split.json").read_text())
    assert report["test"] == {"rows": 80, "groups": 80, "labels": {"negative": 40, "neutral": 20, "positive": 20}}
    assert "validation 40 rows (negative 50.0%, neutral 25.0%, positive 25.0%)" in capsys.readouterr().out
    assert pq.read_table("data/splits/test.parquet")["completion_ids"].null_count == 80


@pytest.mark.usefixtures("workspace")
def test_conversations_keep_their_masks_and_slices_and_are_reported_without_labels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = make_prompts(100)
    for index, row in enumerate(prompts):
        row |= {"label": f"answer {index}", "slice": f"s{index % 2}", "prompt_answer_mask": [index % 2 == 0, False]}
    set_params({"kind": "chat"})
    save_prompts(prompts, {"kind": "chat", "labels": []})
    split.main()
    report = json.loads(Path("data/reports/split.json").read_text())
    assert report["train"] == {"rows": 70, "groups": 70}
    assert "split: train 70 rows; validation 10 rows; test 20 rows\n" in capsys.readouterr().out
    for part in PARTS:
        for row in pq.read_table(f"data/splits/{part}.parquet").to_pylist():
            assert row == {name: prompts[int(row["id"][1:])][name] for name in split.COLUMNS}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "task", [{"kind": "chat"}, labelled(LABELS, True).model_dump(), labelled(LABELS[::-1]).model_dump()]
)
def test_prompts_of_another_task_are_an_error(task: dict[str, Any]) -> None:
    save_prompts(make_prompts(30))
    set_params(task)
    with pytest.raises(UserError, match="made for another kind of task or other labels"):
        split.main()
