"""A params.yaml that is made to do harm: it loads, or it is refused with one message, within moments."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from serving.sagemaker.parameters import write_params
from stages.common.errors import UserError
from stages.common.params import load_params
from stages.common.sources.hub import download_repository
from tests.hostile import FRAGMENTS, anything, examples
from tests.workplace import ROOT

RECIPE = (ROOT / "recipes/tweet-sentiment.yaml").read_text(encoding="utf-8")
LABELS = "labels: [negative, neutral, positive]"
# Nine lists of nine: 387,420,489 values in a few lines.
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def refusal(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_params(path=path)
    assert time.monotonic() - started < 30
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: !!python/object/apply:os.system [touch owned]\n", "not valid YAML"),
        ("task: !!python/object/new:subprocess.Popen [[touch, owned]]\n", "not valid YAML"),
        ("task: !!python/name:os.system\n", "not valid YAML"),
        ("task: !!python/module:os\n", "not valid YAML"),
        ("? !!python/object/apply:os.system [touch owned]\n: 1\n", "not valid YAML"),
        ("!!python/object/apply:os.system [touch owned]\n", "not valid YAML"),
        ("task: !own {a: b}\n", "not valid YAML"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\ntask: !object/apply:os.system [touch owned]\n", "not valid YAML"),
        (LAUGHS + RECIPE, "holds more than 100,000 values"),
        (LAUGHS + RECIPE.replace(LABELS, "labels: *i"), "holds more than 100,000 values"),
        (RECIPE.replace(LABELS, "labels: &l [*l, *l]"), "holds more than 100,000 values"),
        ("a: &a {b: *a, c: *a}\n" + RECIPE, "holds more than 100,000 values"),
        (RECIPE + "z: " + "[" * 20_000, "nested too deeply"),
        ("".join(" " * depth + "a:\n" for depth in range(2_000)), "nested too deeply"),
        (RECIPE + "z: " + "1" * 10_000 + "\n", "not valid YAML"),
        (RECIPE + "z: 2020-99-99\n", "not valid YAML"),
        (RECIPE + "z: !!int x\n", "not valid YAML"),
        (RECIPE + "z: !!bool x\n", "not valid YAML"),
        (RECIPE + "1: x\n", "1: unknown block"),
        (RECIPE + "~: x\n", "None: unknown block"),
        (RECIPE.replace("[negative,", '["a\\0b",'), "task.labels.0: holds a NUL byte"),
        (RECIPE.replace("[negative,", '["\\ud800",'), "task.labels.0: should be a valid string"),
        (RECIPE.replace("[negative,", '["a\\rb",'), "has more than one line"),
        (RECIPE.replace("[negative,", '["a\\u2028b",'), "has more than one line"),
        (RECIPE.replace("learning_rate: 1.0e-3", "learning_rate: .nan"), "learning_rate: should be a finite number"),
        (RECIPE.replace("weight_decay: 0", "weight_decay: .inf"), "weight_decay: should be a finite number"),
    ],
)  # fmt: skip
def test_what_yaml_can_do_beside_plain_values_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(tmp_path / "params.yaml", text)
    assert not (tmp_path / "owned").exists()


PIECES = [
    *FRAGMENTS, "&a ", "*a", "<<: *a", "!!int ", "!!python/name:os.system ", "!!binary ", "!!timestamp ", "? ", ": ",
    "- ", "\n  ", "\n", "[", "]", "{", "}", "|\n", ">\n", "---\n", "...\n", "%YAML 1.1\n", "0x", "1e9", ".inf", "~",
    "#", "task:", "base_model:", "ingest:", "null", "true", "2001-01-01", "\t",
]  # fmt: skip


@examples(250)
@given(
    inserted=st.lists(st.tuples(st.integers(0, len(RECIPE)), st.sampled_from(PIECES) | anything(2)), max_size=4),
    cut=st.none() | st.integers(0, len(RECIPE)),
)
def test_any_file_loads_or_is_refused(
    inserted: list[tuple[int, str]], cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = RECIPE[:cut]
    for place, piece in inserted:
        text = text[:place] + piece + text[place:]
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_params(path=path)
    except UserError as error:
        assert str(path) in str(error)


# --- paths and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "files", "paths": ["/etc/passwd"]}, "does not lie below data/raw/"),
        ({"kind": "files", "paths": ["data/raw/../../params.yaml"]}, "does not lie below data/raw/"),
        ({"kind": "files", "paths": {"train": ["data/raw/a/../../../../etc/*"]}}, "does not lie below data/raw/"),
        ({"kind": "hub", "repo_id": "a/b", "revision": "0" * 40, "paths": ["../../../../etc/passwd"]}, "in the repos"),
        ({"kind": "hub", "repo_id": "a/b", "revision": "0" * 40, "paths": ["/etc/passwd"]}, "in the repository"),
        ({"kind": "package", "requirement": "--pre==1"}, "requirement: String should match pattern"),
        ({"kind": "package", "requirement": "-r==1"}, "requirement: String should match pattern"),
        ({"kind": "package", "requirement": "a==1\n--index-url=x"}, "requirement: String should match pattern"),
        ({"kind": "package", "requirement": "a @ file:///tmp/x"}, "requirement: String should match pattern"),
    ],
)
def test_a_path_or_name_leads_nowhere_else(source: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = YAML(typ="safe").load(RECIPE)
    package = {"distribution": "wheel", "sha256": "0" * 64, "member": ["x"]} if source["kind"] == "package" else {}
    values["ingest"]["source"] = {"format": None} | package | source
    YAML(typ="safe").dump(values, tmp_path / "params.yaml")
    with pytest.raises(UserError) as caught:
        load_params(path=tmp_path / "params.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "-a/b", "a--b/c", "a..b/c", "a/b.git", "./x"])
def test_a_repository_with_a_name_that_the_hub_does_not_allow_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot name a repository on the Hub"):
        download_repository(name, "0" * 40, "model", ["*"], tmp_path / "base")


@examples(60)
@given(name=anything() | st.sampled_from(["../params", "/etc/passwd", "..", "[1]", "{}", "x.yaml", "[" * 9999]))
def test_a_recipe_is_one_of_those_that_are_there(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.getbasetemp() / "job.yaml"
    with pytest.raises(UserError, match="hyperparameter recipe"):
        write_params(target, ROOT, {}, {"recipe": name})
