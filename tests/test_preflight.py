"""The linter before the GPU: each check finds its fault and leaves a sound run alone; published systems' defects."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from preflight import base, check, data, measuring, parameters, run_length
from preflight.base import Base, read_base
from preflight.check import CHECKS, values_of_files, values_of_params
from preflight.findings import Finding, error, run_checks, warning
from preflight.measuring import positives_needed
from preflight.run_length import expected_train_rows, rows_in_one_pass, steps_of_run
from preflight.splits import CONTENTS, SPLITS, read_footer, read_parts
from stages.common.contents import CUT_SLACK_TOKENS, Hits, Part, write_contents
from stages.common.errors import UserError
from stages.common.params import Params, load_params
from stages.common.schema.base_model import FolderModel
from stages.common.tables import open_table

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "tests/published"
HUB = {"source": "hub", "repo_id": "owner/name", "revision": "a" * 40}
HUB_DATA = {"kind": "hub", "repo_id": "owner/data", "revision": "b" * 40, "paths": ["x.csv"], "format": None}
TWO_LABELS = {"task.labels": ["yes", "no"], "task.positive_label": "yes"}
GENERATE = {"infer.method": "generate", "infer.max_new_tokens": 3}
BEGIN, END, BUDGET = 1, 2, 24


# --- parameters -------------------------------------------------------------------------------------------------------


def raw(changes: dict[str, Any]) -> dict[str, Any]:
    """The default recipe's values, some keys changed."""
    values = YAML(typ="safe").load((ROOT / "recipes/tweet-sentiment.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *path, last = key.split(".")
        block = values
        for name in path:
            block = block[name]
        block[last] = copy.deepcopy(value)
    return values


def blocks(**changes: Any) -> dict[str, Any]:
    """The blocks of the default recipe as typed values, some keys changed."""
    types = get_type_hints(Params, include_extras=True)
    return {name: TypeAdapter(types[name]).validate_python(value) for name, value in raw(changes).items()}


def ask(one: Callable[..., Iterable[Finding]], values: dict[str, Any]) -> list[Finding]:
    """What one check finds in the values that it names."""
    return list(one(**{name: values[name] for name in inspect.signature(one).parameters}))


def part(**values: Any) -> Part:
    """A part of 100 rows without a fault."""
    sound: dict[str, Any] = {"rows": 100, "labels": Counter(negative=30, neutral=40, positive=30), "longest_tokens": 20}
    return Part(**sound | values)


def parts(**changed: Part) -> dict[str, Any]:
    """Three sound parts, some replaced."""
    return {"parts": {"train": part(), "validation": part(), "test": part()} | changed}


def completions(**ids: list[int]) -> dict[str, Any]:
    """A prompt format whose labels have these completions."""
    entries = {label: {"text": f" {label}", "ids": tokens} for label, tokens in ids.items()}
    return {"prompt_format": {"terminator_ids": [END], "completions": entries}}


KNOWN = Base(512, "models/base/config.json", "<s>", BEGIN, begins_turns=False)
HIT = Hits(3, ["a", "b", "c"])
RECALL = {"method": "recall", "recall": 0.95, "confidence": 0.95}
CHAT_STYLE = {"format_prompts.style": "chat"}
CHAT_TASK = {"task": {"kind": "chat"}}

# (check, level, values with the fault, values without it, words of the message)
CASES: list[tuple[Callable[..., Any], str, dict[str, Any], dict[str, Any], str]] = [
    (
        run_length.warmup_outlasts_the_run,
        "error",
        blocks(**{"finetune.warmup_steps": 40}) | {"steps": 40},
        blocks(**{"finetune.warmup_steps": 39}) | {"steps": 40},
        "40 in a run of 40 steps: the learning rate 0.001 is never reached",
    ),
    (
        run_length.evaluated_only_at_the_end,
        "warning",
        blocks(**{"finetune.evaluate_every_steps": 200}) | {"steps": 200},
        blocks(**{"finetune.evaluate_every_steps": 199}) | {"steps": 200},
        "the only evaluation is at the end",
    ),
    (
        run_length.rows_never_seen,
        "warning",
        blocks(**{"finetune.max_steps": 60, "finetune.global_batch_size": 8}) | {"rows_a_pass": 1000},
        blocks(**{"finetune.max_steps": 125, "finetune.global_batch_size": 8}) | {"rows_a_pass": 1000},
        "480 of 1,000 rows are seen (48%)",
    ),
    (
        run_length.rows_never_seen,
        "warning",
        blocks(**{"finetune.max_steps": None, "finetune.epochs": 0.5}) | {"rows_a_pass": 1000},
        blocks(**{"finetune.max_steps": None, "finetune.epochs": 1.0}) | {"rows_a_pass": 1000},
        "finetune.epochs: 500 of 1,000 rows are seen",
    ),
    (
        run_length.rows_seen_too_often,
        "warning",
        blocks(**{"finetune.max_steps": None, "finetune.epochs": 21.0}) | {"rows_a_pass": 1000},
        blocks(**{"finetune.max_steps": None, "finetune.epochs": 20.0}) | {"rows_a_pass": 1000},
        "every one of 1,000 rows is seen 21 times",
    ),
    (
        parameters.template_cannot_be_used,
        "error",
        blocks(**{"format_prompts.template": "{{ text }}{% if %}"}),
        blocks(**{"format_prompts.template": "{{ text }}"}),
        "format_prompts.template: Expected an expression, got 'end of statement block' (line 1). Wanted: Jinja with",
    ),
    (
        parameters.template_cannot_be_used,
        "error",
        blocks(**{"format_prompts.template": "{% for one in exemplars %}{{ one.text }}{% endfor %}{{ text }}"}),
        blocks(
            **{
                "format_prompts.template": "{% for one in exemplars %}{{ one.text }}{% endfor %}{{ text }}",
                "ingest.exemplars_per_label": 1,
            }
        ),
        "it uses exemplars, but there are none: set ingest.exemplars_per_label to 1 or more",
    ),
    (
        parameters.revision_can_move,
        "error",
        blocks(base_model={**HUB, "revision": "main"}),
        blocks(base_model=HUB),
        "base_model.revision: 'main' of owner/name is no commit",
    ),
    (
        parameters.revision_can_move,
        "error",
        blocks(**{"ingest.source": {**HUB_DATA, "revision": "v1.0"}}),
        blocks(**{"ingest.source": HUB_DATA}),
        "ingest.source.revision: 'v1.0'",
    ),
    (
        parameters.learning_rate_is_unusual,
        "warning",
        blocks(**{"finetune.learning_rate": 2.1e-3}),
        blocks(**{"finetune.learning_rate": 2e-3}),
        "0.0021 is far from what QLoRA is trained with: training is likely to diverge",
    ),
    (
        parameters.learning_rate_is_unusual,
        "warning",
        blocks(**{"finetune.learning_rate": 9e-6}),
        blocks(**{"finetune.learning_rate": 1e-5}),
        "hardly anything is learned",
    ),
    (
        parameters.warmup_is_ignored,
        "warning",
        blocks(**{"finetune.lr_scheduler": "constant"}),
        blocks(**{"finetune.lr_scheduler": "constant_with_warmup"}),
        "5 has no effect with lr_scheduler 'constant'",
    ),
    (
        parameters.labels_are_nearly_alike,
        "warning",
        blocks(**{"task.labels": ["so so", "So  so", "good"]}),
        blocks(**{"task.labels": ["so so", "so-so", "good"]}),
        "'so so' and 'So  so' differ only in case or white space",
    ),
    (
        parameters.label_begins_another,
        "warning",
        blocks(**{"task.labels": ["physics.gen", "math", "physics"]}),
        blocks(**{"task.labels": ["gen.physics", "math", "physics"]}),
        "'physics.gen' begins with 'physics'",
    ),
    (
        parameters.generated_labels_can_match_nothing,
        "warning",
        blocks(**GENERATE),
        blocks(),
        "answers that can match no label",
    ),
    (
        base.budget_exceeds_the_base,
        "warning",
        blocks(**{"format_prompts.max_length_tokens": 513}) | {"base": KNOWN},
        blocks(**{"format_prompts.max_length_tokens": 512}) | {"base": KNOWN},
        "at most 512 (models/base/config.json)",
    ),
    (
        base.template_spells_the_begin_token,
        "error",
        blocks(**CHAT_STYLE, **{"format_prompts.template": "<s>Tweet: {{ text }}"}) | {"base": KNOWN},
        blocks(**CHAT_STYLE) | {"base": KNOWN},
        "it spells the begin token <s>",
    ),
    (
        data.part_has_no_rows,
        "error",
        parts(validation=Part()),
        parts(),
        "split.validation_share: data/splits/validation.parquet has no rows",
    ),
    (
        data.nothing_to_learn_in_a_row,
        "error",
        parts(train=part(unlearnable=HIT)),
        parts(test=part(unlearnable=HIT)),
        "3 of 100 rows of train have no token to learn",
    ),
    (
        data.mask_does_not_fit_the_prompt,
        "error",
        parts(train=part(wrong_masks=HIT)),
        parts(),
        "not as long as prompt_ids",
    ),
    (
        data.end_token_is_missing,
        "error",
        parts(test=part(endless=Hits(9, ["a"]))),
        parts(test=part(cut=HIT)),
        "9 of 100 rows of test have an answer that does not end in an end token (terminator_ids of the prompt format) "
        "(ids a and 8 more)",
    ),
    (
        data.label_lacks_its_end_token,
        "error",
        completions(yes=[7], no=[8, END]),
        completions(yes=[7, END], no=[8, END]),
        "the completions of yes do not end in an end token",
    ),
    (data.answers_are_cut, "warning", parts(train=part(cut=HIT)), parts(), "3 of 100 rows of train have an answer"),
    (
        data.texts_are_shortened,
        "warning",
        blocks() | {"shortened": (25, 100)},
        blocks() | {"shortened": (0, 100)},
        "25 of 100 rows (25.0%) were shortened to 96 tokens",
    ),
    (
        data.row_is_over_the_budget,
        "error",
        blocks() | parts(train=part(over_budget=HIT, longest_tokens=99)),
        blocks() | parts(),
        "are longer than the budget, up to 99 tokens",
    ),
    (
        data.row_exceeds_the_base,
        "error",
        parts(test=part(longest_tokens=513)) | {"base": KNOWN},
        parts(test=part(longest_tokens=512)) | {"base": KNOWN},
        "the longest row has 513 tokens",
    ),
    (
        data.begin_token_is_doubled,
        "error",
        parts(train=part(doubled_begins=HIT)) | {"base": KNOWN},
        parts(train=part(inner_begins=HIT)) | {"base": KNOWN},
        "have two begin tokens <s> in a row",
    ),
    (
        data.begin_token_is_inside,
        "warning",
        parts(train=part(inner_begins=HIT)) | {"base": KNOWN},
        # ChatML begins every turn with the token that is also its tokenizers' begin token.
        parts(train=part(inner_begins=HIT)) | {"base": KNOWN._replace(begins_turns=True)},
        "in the middle of the prompt",
    ),
    (
        data.labels_have_the_same_tokens,
        "error",
        completions(yes=[7, END], no=[7, END]),
        completions(yes=[7, END], no=[8, END]),
        "the tokenizer makes the same tokens of 'yes' and 'no'",
    ),
    (
        data.label_is_absent_from_train,
        "error",
        blocks() | parts(train=part(labels=Counter(negative=50, positive=50))),
        blocks() | parts(test=part(labels=Counter(negative=50, positive=50))),
        "no row of train has the label neutral",
    ),
    (
        data.label_is_absent_from_test,
        "warning",
        blocks() | parts(test=part(labels=Counter(negative=50, positive=50))),
        blocks() | parts(),
        "no row of test has the label neutral",
    ),
    (data.text_is_in_two_parts, "error", parts(train=part(shared=HIT)), parts(), "split.leakage: 3 of 100 rows"),
    (
        measuring.rare_label_gets_no_weight,
        "warning",
        blocks() | parts(train=part(labels=Counter(negative=9, neutral=51, positive=40))),
        blocks() | parts(train=part(labels=Counter(negative=10, neutral=50, positive=40))),
        "'negative' has 9 of 100 rows of train (9.0%)",
    ),
    (
        measuring.rare_label_gets_no_weight,
        "warning",
        blocks() | parts(train=part(labels=Counter(negative=9, neutral=51, positive=40))),
        blocks(**{"finetune.class_balance": "weighted_loss"})
        | parts(train=part(labels=Counter(negative=9, neutral=51, positive=40))),
        "finetune.class_balance",
    ),
    (
        measuring.part_is_too_small_to_measure_on,
        "warning",
        parts(test=part(rows=29)),
        parts(test=part(rows=30)),
        "split.test_share: test has 29 rows: the standard error of a share of one half is 0.09",
    ),
    (
        measuring.threshold_cannot_be_chosen,
        "error",
        blocks(**TWO_LABELS, **{"evaluate.threshold": RECALL}) | parts(validation=part(labels=Counter(yes=58, no=42))),
        blocks(**TWO_LABELS, **{"evaluate.threshold": RECALL}) | parts(validation=part(labels=Counter(yes=59, no=41))),
        "at least 59 of them. Raise split.validation_share by a factor of 1.0",
    ),
    (
        measuring.threshold_cannot_be_chosen,
        "error",
        blocks(**TWO_LABELS, **{"evaluate.threshold": {"method": "max_f1"}})
        | parts(validation=part(labels=Counter(no=100))),
        blocks(**TWO_LABELS, **{"evaluate.threshold": {"method": "fixed", "value": 0.5}})
        | parts(validation=part(labels=Counter(no=100))),
        "use a fixed threshold",
    ),
    (
        measuring.label_is_longer_than_generated,
        "error",
        blocks(**GENERATE) | completions(negative=[5, 6, 7, 8, END], neutral=[9, END]),
        blocks(**GENERATE) | completions(negative=[5, 6, 7, END], neutral=[9, END]),
        "3 is too short for negative",
    ),
    (
        measuring.references_are_longer_than_generated,
        "warning",
        blocks(**CHAT_TASK, **GENERATE) | parts(test=part(labels=Counter(), answer_tokens=Counter([2, 4, 9]))),
        blocks(**CHAT_TASK, **GENERATE) | parts(test=part(labels=Counter(), answer_tokens=Counter([2, 3, 9]))),
        "3 is shorter than 67% of the references in test (median 4 tokens)",
    ),
]


@pytest.mark.parametrize(
    ("one", "level", "faulty", "sound", "words"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_a_check_finds_its_fault_and_nothing_where_there_is_none(
    one: Callable[..., Any], level: str, faulty: dict[str, Any], sound: dict[str, Any], words: str
) -> None:
    [finding] = ask(one, faulty)
    assert words in str(finding)
    assert finding.level == level
    assert ask(one, sound) == []


def test_every_check_of_the_table_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)


def test_multi_label_tasks_wait_for_no_rare_label_and_need_positives_of_each() -> None:
    labels = Counter(negative=59, neutral=60, positive=5)
    values = blocks(**{"task.multi_label": True, "evaluate.threshold": RECALL}) | parts(
        train=part(labels=Counter(negative=1)), validation=part(labels=labels)
    )
    [finding] = ask(measuring.threshold_cannot_be_chosen, values)
    assert "5 with 'positive'" in finding.found
    assert "neutral" not in finding.found
    # A rare label may be in no row of train; split stratifies single labels only.
    assert [found.level for found in ask(data.label_is_absent_from_train, values)] == ["warning"]


def test_checks_of_labels_leave_tasks_of_texts_alone() -> None:
    values = (
        blocks(**CHAT_TASK, **GENERATE)
        | completions()
        | parts(**dict.fromkeys(("train", "test"), part(labels=Counter())))
    )
    about_labels: list[Callable[..., Any]] = [
        *(parameters.labels_are_nearly_alike, parameters.label_begins_another, data.label_is_absent_from_test),
        *(parameters.generated_labels_can_match_nothing, data.label_is_absent_from_train),
        *(measuring.rare_label_gets_no_weight, measuring.threshold_cannot_be_chosen),
        measuring.label_is_longer_than_generated,
    ]
    assert [found for one in about_labels for found in ask(one, values)] == []


def test_the_positives_that_a_promise_needs_are_wilks_numbers() -> None:
    # Wilks (1941): .95 content with .95 confidence needs 59 observations; .90/.95 needs 29, .99/.95 needs 299.
    assert [positives_needed(recall, 0.95) for recall in (0.9, 0.95, 0.99)] == [29, 59, 299]
    assert positives_needed(0.1, 0.99) == 2


# --- length of the run ------------------------------------------------------------------------------------------------


def test_a_pass_has_the_rows_that_training_sees() -> None:
    labels = Counter(negative=10, neutral=60, positive=30)
    single, several = blocks()["task"], blocks(**{"task.multi_label": True})["task"]
    assert rows_in_one_pass(single, "none", 100, labels) == 100
    assert rows_in_one_pass(single, "weighted_loss", 100, labels) == 100
    assert rows_in_one_pass(single, "oversample", 100, labels) == 180
    assert rows_in_one_pass(several, "none", 100, labels) == 300
    assert rows_in_one_pass(blocks(**CHAT_TASK)["task"], "none", 100, Counter()) == 100


def test_steps_are_counted_as_the_trainer_does() -> None:
    # transformers' Trainer: 101 rows in batches of 16 are 7 steps an epoch, and 1.5 epochs 11 of them (ceil of 10.5).
    epochs = blocks(**{"finetune.max_steps": None, "finetune.epochs": 1.5})["finetune"]
    assert steps_of_run(epochs, 101) == 11
    assert steps_of_run(blocks()["finetune"], 101) == 200


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"ingest.rows": 1000}, 800),
        ({"ingest.rows": None}, None),
        ({"ingest.source": {**HUB_DATA, "paths": {"train": ["a"]}}, "ingest.rows": {"train": 1000}}, 1000),
        ({"ingest.source": {**HUB_DATA, "paths": {"train": ["a"]}}, "ingest.rows": 1000}, None),
        ({"ingest.columns.split": "part", "ingest.rows": 1000}, None),
    ],
)
def test_rows_of_train_are_estimated_where_params_fix_them(changes: dict[str, Any], rows: int | None) -> None:
    values = blocks(**changes)
    assert expected_train_rows(values["ingest"], values["split"]) == rows


def test_the_length_of_a_run_is_known_from_params_where_they_fix_it(tmp_path: Path) -> None:
    def known(**changes: Any) -> dict[str, Any]:
        write_params(tmp_path, **changes)
        values = values_of_params(load_params(path=tmp_path / "params.yaml"))
        return {name: values[name] for name in ("steps", "rows_a_pass") if name in values}

    assert known(**{"ingest.rows": 1000}) == {"steps": 200, "rows_a_pass": 800}
    assert known() == {"steps": 200}
    assert known(**{"finetune.max_steps": None, "finetune.epochs": 1.0}) == {}
    # How many rows oversampling makes of them depends on their labels.
    assert known(**{"ingest.rows": 1000, "finetune.class_balance": "oversample"}) == {"steps": 200}


# --- data/splits ------------------------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "text", "label", "group", "slice", "prompt", "completion")),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_answer_mask", pa.list_(pa.bool_())),
        ("completion_ids", pa.list_(pa.int32())),
    ]
)


def row(number: int, **values: Any) -> dict[str, Any]:
    """A sound row of a classification task."""
    made = dict.fromkeys(SCHEMA.names) | {
        "id": str(number),
        "text": f"text {number}",
        "label": ["negative", "neutral", "positive"][number % 3],
        "prompt_ids": [BEGIN, 10, 11],
        "completion_ids": [20 + number % 3, END],
    }
    return made | values


def write_splits(
    root: Path, rows: dict[str, list[dict[str, Any]]] | None = None, kind: str = "classification", **footer: Any
) -> None:
    """Write data/splits/ below `root` as the stage does, with the default recipe's prompt format."""
    params = raw({})
    labels = params["task"]["labels"]
    entries = {label: {"text": f" {label}", "ids": [20 + place, END]} for place, label in enumerate(labels)}
    block = {name: params["format_prompts"][name] for name in ("style", "system", "template")}
    made = {"kind": kind, "labels": labels, "completions": entries, "terminator_ids": [END], "exemplars": []}
    made |= block | {"label_descriptions": None, "max_length_tokens": BUDGET} | footer
    start = 0
    for name in ("train", "validation", "test"):
        own = (rows or {}).get(name, [row(start + number) for number in range(12)])
        start += 12
        with open_table(root / f"data/splits/{name}.parquet", SCHEMA, {"prompt_format": made}) as table:
            for values in own:
                table.add(values)


def read(root: Path, begin_id: int | None = BEGIN) -> dict[str, Part]:
    footer = read_footer(root)
    assert footer is not None
    return read_parts(footer, begin_id, root)


def test_sound_splits_have_no_hits(tmp_path: Path) -> None:
    write_splits(tmp_path)
    for found in read(tmp_path).values():
        assert found.rows == 12
        assert found.labels == {"negative": 4, "neutral": 4, "positive": 4}
        assert found.longest_tokens == 5
        assert found.answer_tokens == {2: 12}
        assert not [name for name, value in vars(found).items() if isinstance(value, Hits) and value.count]


# (field, kind of row, the row's values, whether they are a hit)
ROWS = [
    ("unlearnable", "classification", {"completion_ids": []}, True),
    ("unlearnable", "classification", {"completion_ids": None}, True),
    ("unlearnable", "question_answering", {"completion_ids": [END]}, True),
    ("unlearnable", "chat", {"completion_ids": [], "prompt_answer_mask": [False, False, False]}, True),
    ("unlearnable", "chat", {"completion_ids": [], "prompt_answer_mask": [False, True, False]}, False),
    ("wrong_masks", "chat", {"prompt_answer_mask": [False, True]}, True),
    ("wrong_masks", "chat", {"prompt_answer_mask": [False, True, True]}, False),
    ("endless", "question_answering", {"completion_ids": [30, 31]}, True),
    ("endless", "question_answering", {"completion_ids": [30] * (BUDGET - 3)}, False),
    ("endless", "classification", {"completion_ids": [30] * (BUDGET - 3)}, True),
    ("cut", "question_answering", {"completion_ids": [30] * (BUDGET - 3)}, True),
    ("cut", "chat", {"completion_ids": [30] * (BUDGET - 3 - CUT_SLACK_TOKENS)}, True),
    ("cut", "chat", {"completion_ids": [30] * (BUDGET - 4 - CUT_SLACK_TOKENS)}, False),
    ("over_budget", "chat", {"completion_ids": [30] * (BUDGET - 3) + [END]}, True),
    ("over_budget", "chat", {"completion_ids": [30] * (BUDGET - 4) + [END]}, False),
    ("doubled_begins", "chat", {"prompt_ids": [BEGIN, BEGIN, 10]}, True),
    ("doubled_begins", "chat", {"prompt_ids": [10, BEGIN, BEGIN]}, True),
    ("doubled_begins", "chat", {"prompt_ids": [BEGIN, 10, BEGIN]}, False),
    ("inner_begins", "chat", {"prompt_ids": [BEGIN, 10, BEGIN]}, True),
    ("inner_begins", "chat", {"prompt_ids": [BEGIN, 10, 11]}, False),
    ("shared", "chat", {"text": "Text, 30!"}, True),
    ("shared", "chat", {"text": "text 31 and more"}, False),
    ("shared", "chat", {"text": "😀"}, False),
]


@pytest.mark.parametrize(("field", "kind", "values", "hit"), ROWS)
def test_a_row_with_a_fault_is_counted_under_its_id(
    tmp_path: Path, field: str, kind: str, values: dict[str, Any], hit: bool
) -> None:
    rows = [row(0), row(1, **values), row(2)]
    footer: dict[str, Any] = {} if kind == "classification" else {"labels": [], "completions": {}}
    write_splits(tmp_path, {"train": rows}, kind, **footer)
    assert getattr(read(tmp_path)["train"], field) == (Hits(1, ["1"]) if hit else Hits())


def test_a_begin_token_at_the_end_of_one_row_and_the_start_of_the_next_is_not_doubled(tmp_path: Path) -> None:
    rows = [row(0, prompt_ids=[]), row(1, prompt_ids=[10, BEGIN]), row(2, prompt_ids=[BEGIN, 10])]
    write_splits(tmp_path, {"train": rows})
    found = read(tmp_path)["train"]
    assert (found.doubled_begins, found.inner_begins) == (Hits(), Hits(1, ["1"]))
    assert read(tmp_path, begin_id=None)["train"].inner_begins == Hits()


def test_rows_are_found_in_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.common.contents.ROWS_AT_A_TIME", 3)
    rows = [row(number, prompt_answer_mask=[True] * 3) for number in range(10)]
    rows[7] |= {"prompt_ids": [BEGIN, BEGIN], "prompt_answer_mask": [True, False], "completion_ids": [20]}
    write_splits(tmp_path, {"train": rows})
    found = read(tmp_path)["train"]
    assert [hits.ids for hits in (found.doubled_begins, found.endless)] == [["7"], ["7"]]
    assert (found.rows, found.wrong_masks, found.unlearnable) == (10, Hits(), Hits())


@pytest.mark.parametrize("kind", ["classification", "question_answering", "multi_label"])
def test_what_the_split_stage_wrote_down_is_taken_for_these_very_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cells = {"label": '["positive"]', "completion_ids": None} if kind == "multi_label" else {}
    own = [row(number, **cells) for number in range(11)] + [row(11, prompt_ids=[BEGIN, BEGIN] * 20, **cells)]
    footer: dict[str, Any] = {"labels": []} if kind == "question_answering" else {}
    others = [row(20 + number, **cells) for number in range(3)]
    write_splits(tmp_path, {"train": own, "validation": others, "test": others}, kind, **footer)
    counted = read(tmp_path)
    assert counted["train"].doubled_begins == counted["train"].over_budget == Hits(1, ["11"])
    write_contents(tmp_path / CONTENTS, tmp_path / SPLITS, BEGIN)
    with monkeypatch.context() as patch:
        patch.setattr("preflight.splits.count_parts", lambda *_: pytest.fail("all rows are read"))
        assert read(tmp_path) == counted
    assert read(tmp_path, begin_id=20)["train"].doubled_begins == Hits(), "another tokenizer"

    # The same rows but one, and the same footer.
    table = pq.read_table(tmp_path / SPLITS / "train.parquet")
    pq.write_table(table.slice(0, 11), tmp_path / SPLITS / "train.parquet", compression="zstd")
    assert read(tmp_path)["train"].doubled_begins == Hits()
    write_contents(tmp_path / CONTENTS, tmp_path / SPLITS, BEGIN)
    values = json.loads((tmp_path / CONTENTS).read_text())
    del values["parts"]["test"]["squares"]
    (tmp_path / CONTENTS).write_text(json.dumps(values | {"older": 1}))
    assert read(tmp_path)["train"].rows == 11


def test_rows_of_multi_label_count_under_each_label_and_are_as_long_as_their_longest_answer(tmp_path: Path) -> None:
    several = {"label": json.dumps(["negative", "positive"]), "completion_ids": None}
    none = {"label": "[]", "completion_ids": None}
    own = [row(0, **several), row(1, **none)]
    entries = {"negative: yes": {"text": "", "ids": [5] * 21 + [END]}, "negative: no": {"text": "", "ids": [6, END]}}
    write_splits(tmp_path, dict.fromkeys(("train", "validation", "test"), own), "multi_label", completions=entries)
    found = read(tmp_path)["test"]
    assert found.labels == {"negative": 1, "positive": 1}
    assert (found.longest_tokens, found.over_budget.count) == (25, 2)
    assert (found.unlearnable, found.endless, found.answer_tokens) == (Hits(), Hits(), Counter())


# --- the base model ---------------------------------------------------------------------------------------------------


def write_base(root: Path, config: dict[str, Any] | None = None, **settings: Any) -> FolderModel:
    source = FolderModel(source="folder", path="base")
    written = {"models/base.json": {"source": source.model_dump()}, "models/tokenizer/tokenizer_config.json": settings}
    written["models/tokenizer/tokenizer.json"] = {"added_tokens": [{"content": "<s>", "id": BEGIN}]}
    if config is not None:
        written["models/base/config.json"] = config
    for name, value in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value), encoding="utf-8")
    return source


@pytest.mark.parametrize(
    ("config", "length", "positions"),
    [
        ({"max_position_embeddings": 2048}, 10**30, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 512, 4096),
        # YaRN as Qwen2.5's model card switches it on.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            10**30,
            131072,
        ),
        (None, 8192, 8192),
        (None, 10**30, None),
        ({}, None, None),
    ],
)
def test_positions_come_from_the_configuration_or_a_sane_tokenizer(
    tmp_path: Path, config: dict[str, Any] | None, length: int | None, positions: int | None
) -> None:
    found = read_base(write_base(tmp_path, config, model_max_length=length), tmp_path)
    assert found is not None
    assert found.positions == positions


def test_the_begin_token_is_known_and_whether_turns_begin_with_it(tmp_path: Path) -> None:
    source = write_base(tmp_path, bos_token={"content": "<s>"}, chat_template="{{ bos_token }}{{ messages }}")
    found = read_base(source, tmp_path)
    assert found is not None
    assert (found.begin_token, found.begin_id, found.begins_turns) == ("<s>", BEGIN, False)
    (tmp_path / "models/tokenizer/chat_template.jinja").write_text("{{ '<s>' + role }}", encoding="utf-8")
    found = read_base(source, tmp_path)
    assert found is not None
    assert found.begins_turns
    assert read_base(FolderModel(source="folder", path="another"), tmp_path) is None


# --- the command ------------------------------------------------------------------------------------------------------


def write_params(root: Path, **changes: Any) -> None:
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(raw(changes), file)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, data/splits/ and the base's small files; this process works in it."""
    source = write_base(tmp_path, {"max_position_embeddings": 512}, bos_token="<s>")
    changes = {"base_model": source.model_dump(), "format_prompts.max_length_tokens": BUDGET}
    write_params(tmp_path, **changes, **{"finetune.max_steps": 10, "finetune.evaluate_every_steps": 5})
    write_splits(tmp_path)
    with open_table(tmp_path / "data/prompts.parquet", pa.schema([("shortened", pa.bool_())])) as table:
        for _ in range(36):
            table.add({"shortened": False})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preflight.check"])
    return tmp_path


def test_a_sound_project_passes_all_checks(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its parts are small, so that it is made quickly.
    monkeypatch.setattr(measuring, "FEW_ROWS", 2)
    check.main()
    assert capsys.readouterr().out == f"preflight: {len(CHECKS)} of {len(CHECKS)} checks made, no errors, warnings: 0\n"


def test_all_errors_are_in_one_message_and_warnings_before_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_splits(project, {"train": [row(0, completion_ids=[]), row(1, prompt_ids=[BEGIN, BEGIN]), row(2)], "test": []})
    with pytest.raises(UserError) as caught:
        check.main()
    for words in ("preflight found 3", "no token to learn", "two begin tokens", "test.parquet has no rows"):
        assert words in str(caught.value)
    assert "every one of 3 rows is seen 53 times" in capsys.readouterr().out


def test_before_the_data_exist_params_alone_are_checked_and_the_others_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "data/splits/test.parquet").unlink()
    write_params(project, **{"finetune.warmup_steps": 200})
    with pytest.raises(UserError, match="200 in a run of 200 steps"):
        check.main()
    shown = capsys.readouterr().out
    waiting = re.search(r"waiting for data/splits, which `dvc repro split` makes: (\d+) checks", shown)
    assert waiting
    # Those of the data wait; those of params.yaml do not.
    assert len(data.CHECKS) <= int(waiting[1]) < len(CHECKS) - len(parameters.CHECKS)


def test_data_of_other_parameters_are_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_splits(project, {"test": []}, template="Text: {{ text }}")
    check.main()
    assert "(other there: format_prompts.template)" in capsys.readouterr().out


def test_a_base_of_other_parameters_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(project, **{"format_prompts.max_length_tokens": BUDGET, "finetune.max_steps": 6})
    check.main()
    assert "waiting for models/base.json of this base_model" in capsys.readouterr().out


def test_a_base_that_is_there_serves_before_the_data_do(project: Path) -> None:
    (project / "data/splits/test.parquet").unlink()
    values, waits_for = values_of_files(load_params())
    assert list(values) == ["base"]
    assert waits_for.startswith("data/splits")


def test_without_the_prompts_only_the_count_of_shortened_texts_waits(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "data/prompts.parquet").unlink()
    check.main()
    assert "waiting for data/prompts.parquet, which `dvc checkout` restores: texts are shortened\n" in (
        capsys.readouterr().out
    )


def test_with_the_word_params_data_cannot_stop_a_run_that_would_make_them_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_splits(project, {"test": []})
    monkeypatch.setattr(sys, "argv", ["preflight.check", "params"])
    check.main()
    assert "waiting for the finetune stage, which has the data" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["preflight.check", "parms"])
    with pytest.raises(UserError, match="Allowed: none, or `params`"):
        check.main()


def test_a_check_runs_when_all_values_that_it_names_are_there() -> None:
    def too_large(size: int) -> Iterable[Finding]:
        if size > 3:
            yield warning("size", str(size), "3", "Shrink it")

    def no_name(size: int, name: str) -> Iterable[Finding]:
        yield error("name", f"{name} {size}", "a name", "Give one")

    findings, waiting = run_checks([too_large, no_name], {"size": 4})  # type: ignore[list-item]
    assert ([str(finding) for finding in findings], waiting) == (["size: 4. Wanted: 3. Shrink it."], ["no name"])


def test_the_command_needs_no_training_library(project: Path) -> None:
    program = (
        "import sys; from preflight.check import main; sys.argv = ['check']; main()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl', 'peft', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "[]"


# --- recipes and published systems ------------------------------------------------------------------------------------


def lint(path: Path) -> list[Finding]:
    """What params.yaml alone gives away."""
    return run_checks(CHECKS, values_of_params(load_params(path=path)))[0]


# No commit of real-jiakai/arxiver-with-category is known: the recipes say so, and their users have to pin it.
UNPINNED = {"arxiv-topics", "arxiv-topics.tuned"}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_has_an_error(recipe: Path) -> None:
    errors = [finding.key for finding in lint(recipe) if finding.level == "error"]
    assert errors == (["ingest.source.revision"] if recipe.stem in UNPINNED else [])


def test_every_published_system_is_here() -> None:
    names = ["arxiv-topics", "chat-assistant", "medical-qa", "slr-screening", "tweeteval-sentiment"]
    assert sorted(path.stem for path in PUBLISHED.glob("*.yaml")) == names


# Known defects of the published systems, read off their code and reports.
@pytest.mark.parametrize(
    ("name", "level", "words"),
    [
        ("chat-assistant", "error", "finetune.warmup_steps: 50 in a run of 40 steps"),
        ("chat-assistant", "warning", "640 of 27,000 rows are seen (2%)"),
        ("chat-assistant", "error", "ingest.further_sources.0.source.revision: 'main'"),
        ("tweeteval-sentiment", "warning", "480 of 1,000 rows are seen (48%)"),
        ("tweeteval-sentiment", "error", "base_model.revision: 'main'"),
        ("slr-screening", "warning", "leaves them out of the accuracy's denominator"),
    ],
)
def test_a_published_systems_defect_is_named(name: str, level: str, words: str) -> None:
    assert [finding.level for finding in lint(PUBLISHED / f"{name}.yaml") if words in str(finding)] == [level]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arxiv-topics", "finetune.max_seq_length: unknown key"),
        ("medical-qa", "evaluate: this block is missing"),
    ],
)
def test_a_published_system_with_a_key_too_many_or_a_block_too_few_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        lint(PUBLISHED / f"{name}.yaml")
    assert words in str(caught.value)
    # Nothing else is wrong with the file, so that the defect is what stops it.
    assert len(str(caught.value).splitlines()) == 3


def test_the_published_arxiv_system_without_its_unread_key_is_told_that_answers_can_match_nothing(
    tmp_path: Path,
) -> None:
    text = (PUBLISHED / "arxiv-topics.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("  max_seq_length: 512\n", ""), encoding="utf-8")
    assert [finding.key for finding in lint(tmp_path / "params.yaml") if finding.level == "warning"] == ["infer.method"]


def test_a_published_run_is_measured_on_its_rows_once_they_are_there(tmp_path: Path) -> None:
    params = load_params(path=PUBLISHED / "tweeteval-sentiment.yaml")
    rows = [row(number) for number in range(1000)]
    footer = {name: getattr(params.format_prompts, name) for name in ("style", "system", "template")}
    write_splits(tmp_path, {"train": rows, "test": [row(2000)]}, **footer, max_length_tokens=2048)
    values = values_of_params(params) | values_of_files(params, tmp_path)[0]
    findings = run_checks(CHECKS, values)[0]
    assert [str(finding) for finding in findings if "480 of 1,000 rows" in str(finding)]
