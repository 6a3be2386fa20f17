"""params.yaml: every mistake is found, all at once, with its key."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.common.errors import UserError
from stages.common.params import Params, load_params
from stages.common.schema.fields import Block
from stages.common.schema.task import ClassificationTask

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def write(path: Path, values: Any) -> Path:
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
    return path


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(read(ROOT / "recipes/tweet-sentiment.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_loading_changes_no_value(recipe: Path) -> None:
    assert load_params(path=recipe).model_dump() == read(recipe)


def test_the_default_params_are_the_default_recipe() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "recipes/tweet-sentiment.yaml").read_bytes()


def test_no_field_has_a_default_so_that_the_schema_supplies_no_value() -> None:
    assert len(Block.__subclasses__()) > 10
    assert [
        f"{block.__name__}.{name}"
        for block in Block.__subclasses__()
        for name, field in block.model_fields.items()
        if not field.is_required()
    ] == []


def test_every_key_is_read_by_some_code() -> None:
    read_names = {
        node.attr
        for folder in ("stages", "preflight")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "schema"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    fields = {f"{block.__name__}.{name}" for block in Block.__subclasses__() for name in block.model_fields}
    # `kind` and `source` choose the class, so isinstance() reads them.
    chosen_by_class = {"PackageModel.source", "HubModel.source", "FolderModel.source"}
    chosen_by_class |= {"FilesSource.kind", "HubSource.kind", "PackageSource.kind"}
    assert sorted(field for field in fields - chosen_by_class if field.partition(".")[2] not in read_names) == []


def test_a_stage_gets_the_blocks_it_names_and_no_other(values: dict[str, Any], tmp_path: Path) -> None:
    values["evaluate"]["seed"] = "not a number"
    loaded = load_params("task", "split", path=write(tmp_path / "params.yaml", values))
    assert loaded.split.seed == 42
    with pytest.raises(AttributeError):
        _ = loaded.evaluate


def edit(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    if value is ...:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("finetune.learning_rate", "fast", "finetune.learning_rate: should be a valid number, not 'fast'"),
        ("finetune.learning_rate", 2, "finetune.learning_rate: should be less than 1"),
        ("finetune.seed", True, "finetune.seed"),
        ("finetune.lorra", {}, "finetune.lorra: unknown key"),
        ("finetune.epochs", 1, "one of epochs and max_steps"),
        ("split.seed", ..., "split.seed: this key is missing"),
        ("split", ..., "split: this block is missing"),
        ("fine_tune", {}, "fine_tune: unknown block; did you mean finetune?"),
        ("split.test_share", 0.95, "must be below 1"),
        ("task.labels", ["a", "b", "a"], "['a'] listed more than once"),
        ("task.labels", ["a"], "at least 2 items"),
        ("task.labels", ["a", "b", " c"], "white space"),
        ("task.labels", ["a", "b", "<invalid>"], "unreadable answer"),
        ("task.labels", ["a", "b", "c", "d"], "2 edges make 3 bins, but task.labels names 4 labels"),
        ("task.labels", ["a", "b"], "positive_label: with two labels"),
        ("task.positive_label", "neutral", "must be null with more than two labels"),
        ("task.label_descriptions", {"neutral": "neither"}, "exactly the labels as keys"),
        ("base_model.source", "floppy", "'package', 'hub', 'folder'"),
        ("base_model.sha256", "abc", "base_model.sha256"),
        ("ingest.columns.label", {"column": "x", "bins": [1, 1]}, "must increase"),
        ("ingest.columns.label", {"column": "x", "aliases": {"neg": "bad"}}, "['bad'] are not in task.labels"),
        ("ingest.source", {"kind": "files", "paths": ["/etc/passwd"], "format": None}, "below data/raw/"),
        ("ingest.source", {"kind": "files", "paths": ["data/raw/../x.csv"], "format": None}, "below data/raw/"),
        ("ingest.max_refused_share", 1, "less than 1"),
        ("format_prompts.system", "Be brief.", "must be null with style 'plain'"),
        ("infer.max_new_tokens", 4, "null with 'label_scores'"),
        ("infer.method", "guess", "'label_scores' or 'generate'"),
        ("evaluate.threshold", {"method": "max_f1"}, "must be null with more than two labels"),
        ("evaluate.threshold", {"method": "recall", "recall": 0.9}, "threshold.confidence: this key is missing"),
        ("task.kind", "chat", "task.labels: unknown key with kind: chat"),
        ("task.kind", "qa", "task.kind: 'qa' is none of 'classification', 'question_answering', 'chat'"),
        ("ingest.rows", 0, "ingest.rows: should be greater than or equal to 1"),
        ("ingest.columns.label", {"column": "x", "seperator": None, "aliases": None}, "did you mean separator?"),
        ("ingest.columns.text", {"column": "x", "format": "xml"}, "text.format: should be 'sharegpt' or 'messages'"),
    ],
)
def test_a_mistake_is_named_with_its_key(
    values: dict[str, Any], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    edit(values, key, value)
    with pytest.raises(UserError) as caught:
        load_params(path=write(tmp_path / "params.yaml", values))
    assert message in str(caught.value)


def test_of_a_union_only_the_member_that_was_meant_is_described(values: dict[str, Any], tmp_path: Path) -> None:
    edit(values, "ingest.columns.label", {"column": "x", "seperator": None, "aliases": None})
    with pytest.raises(UserError) as caught:
        load_params(path=write(tmp_path / "params.yaml", values))
    assert str(caught.value).splitlines()[1:-1] == [
        "  ingest.columns.label.separator: this key is missing",
        "  ingest.columns.label.seperator: unknown key; did you mean separator?",
    ]


def test_all_mistakes_are_named_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    edit(values, "finetune.lora.r", 0)
    edit(values, "evaluate.bootstrap_samples", 3)
    edit(values, "split.leakage", "ignore")
    with pytest.raises(UserError) as caught:
        load_params(path=write(tmp_path / "params.yaml", values))
    for key in ("finetune.lora.r", "evaluate.bootstrap_samples", "split.leakage"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not valid YAML"),
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("task: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("task: 1\ntask: 2\n", "not valid YAML"),
    ],
    ids=["broken", "empty", "a list", "a tag that runs code", "a key twice"],
)
def test_a_file_that_is_no_usable_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_params(path=path)


def test_yaml_reads_as_dvc_reads_it(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "recipes/tweet-sentiment.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("labels: [negative, neutral,", "labels: [no, yes,").replace("1.0e-3", "1e-3"))
    loaded = load_params(path=path)
    assert isinstance(loaded.task, ClassificationTask)
    assert loaded.task.labels[:2] == ["no", "yes"]
    assert loaded.finetune.learning_rate == 0.001


def test_the_names_of_the_blocks_are_the_contract() -> None:
    assert list(Params.model_fields) == [
        "task",
        "base_model",
        "ingest",
        "format_prompts",
        "split",
        "finetune",
        "infer",
        "evaluate",
    ]
