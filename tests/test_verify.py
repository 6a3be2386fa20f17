"""A commit is proved by review.verify, and each way of tampering with one is found; real git, dvc and a tiny model."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from review.verify import arguments
from stages.common.tables import read_json, write_json
from tests.project import Project
from tests.stored import WEIGHTS, Stored, damage, files_in, flipped, locked, object_at

PREDICTIONS = "data/predictions/adapter/test.parquet"
PROBABILITY = "probability.bad"


@pytest.fixture
def project(stored: Stored, tmp_path: Path) -> Project:
    """A clone with everything in its workspace and cache, to be tampered with."""
    return stored.project.copy(tmp_path / "repository")


def verify(project: Project, *arguments: str, fails: bool = False, model: bool = False) -> str:
    """What the command prints."""
    return project.python("-m", "review.verify", *([] if model else ["--no-model"]), *arguments, fails=fails)


def unlink_from_cache(path: Path) -> None:
    """Give the workspace a file of its own: written in place it might be the cache's."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def commit_as_it_is(project: Project, message: str) -> None:
    """Let dvc.lock have the hashes of whatever is in the workspace, and commit."""
    project.dvc("commit", "--force")
    project.commit(message)


def change_a_probability(project: Project, row: int = 0) -> str:
    """Move half of a row's probability of one label to another; the row's id."""
    path = project.folder / PREDICTIONS
    table = pq.read_table(path).to_pydict()
    table["probability.good"][row] += table[PROBABILITY][row] / 2
    table[PROBABILITY][row] /= 2
    path.unlink()
    pq.write_table(pa.table(table, pq.read_schema(project.folder / "data/predictions/base/test.parquet")), path)
    return str(table["id"][row])


# --- a sound commit ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clone_that_has_pulled_nothing_verifies_the_commit_and_stays_as_it_is(stored: Stored, tmp_path: Path) -> None:
    clone = stored.project.clone(tmp_path / "clone")
    clone.environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    before = clone.git("status", "--porcelain", "--ignored")
    said = verify(clone, "--rows", "1000", model=True)
    assert re.search(r"verified: HEAD \([0-9a-f]{7}\)$", said.strip()), said
    objects = re.search(r"verify: (\d+) objects, [\d,]+ bytes, have the hashes of dvc.lock \((\d+) came", said)
    assert objects is not None, said
    assert objects[1] == objects[2] != "0"
    assert "evaluate and report give, byte for byte, models/decision.json, metrics/metrics.json" in said
    for name in ("adapter", "base"):
        found = re.search(
            rf"12 validation rows and 12 test rows .* re-scored with the {name}: .* most (\S+) apart", said
        )
        assert found is not None, said
        assert float(found[1]) < 1e-6, "the same machine, another batch"
    # What DVC keeps for itself lies in .dvc/tmp, which is ignored.
    assert clone.git("status", "--porcelain", "--ignored") in (before, before + "!! .dvc/tmp/\n")
    assert not (clone.folder / ".dvc/cache").exists()


@pytest.mark.slow
def test_an_older_commit_is_verified_by_its_own_parameters_beside_changed_files(project: Project) -> None:
    commit = project.git("rev-parse", "HEAD").strip()
    project.edit_params("evaluate.bootstrap_samples", 150)
    project.repro()
    project.commit("Fewer samples")
    project.edit_file("metrics/report.md", "Results", "Outcome")
    workspace = {folder: files_in(project.folder / folder) for folder in ("data", "models", "metrics", ".git")}
    assert f"verified: {commit[:7]}; whether its answers come from its adapter was not" in verify(project, commit)
    assert {folder: files_in(project.folder / folder) for folder in workspace} == workspace


@pytest.mark.parametrize("options", [("--rows", "0"), ("--seed", "-1")])
def test_a_sample_that_cannot_be_drawn_is_a_wrong_use_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify", *options])
    with pytest.raises(SystemExit, match="2"):
        arguments()
    assert "--rows has to be 1 or more" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["verify", "--no-model", *options])
    assert not arguments().model


def test_it_takes_no_torch_unless_rows_are_re_scored(project: Project) -> None:
    without = "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'peft', 'bitsandbytes']); "
    run = "runpy.run_module('review.verify', run_name='__main__', alter_sys=True)"
    assert "verified" in project.python("-c", f"{without}sys.argv = ['verify', '--no-model']; {run}")
    said = project.python("-c", f"{without}sys.argv = ['verify']; {run}", fails=True)
    assert "takes torch, which is not here: `make setup`, or give --no-model" in said


# --- tampering --------------------------------------------------------------------------------------------------------


def test_a_metric_edited_by_hand_is_found_by_the_lock_and_by_its_value(project: Project) -> None:
    honest = project.metrics()["adapter"]["f1_macro"]
    project.edit_file("metrics/metrics.json", f'"f1_macro": {honest}', '"f1_macro": 0.99')
    project.commit("Better numbers")
    said = verify(project, fails=True)
    assert "metrics/metrics.json is not what it wrote (evaluate)" in said
    assert f"metrics/metrics.json: adapter.f1_macro: committed 0.99, recomputed {honest}" in said


def test_a_metric_that_no_stage_writes_any_more_is_found(project: Project) -> None:
    project.edit_file("dvc.yaml", "      - metrics/metrics.json: {cache: false}\n", "")
    project.edit_file("metrics/metrics.json", '"accuracy": ', '"accuracy": 1')
    commit_as_it_is(project, "Numbers of nobody's")
    assert "metrics/metrics.json: evaluate does not write it, by dvc.yaml" in verify(project, fails=True)


def test_an_edited_report_is_found_though_the_lock_has_its_hash(project: Project) -> None:
    project.edit_file("metrics/report.md", "# Results", "# Splendid results")
    commit_as_it_is(project, "A better report")
    said = verify(project, fails=True)
    assert "metrics/report.md: line 1: committed '# Splendid results', recomputed '# Results'" in said


def test_a_changed_probability_is_found_by_the_metrics_though_the_lock_has_its_hash(project: Project) -> None:
    change_a_probability(project)
    commit_as_it_is(project, "Another answer")
    said = verify(project, fails=True)
    assert "verify: dvc.lock belongs to code, parameters, data and metrics\n" in said
    assert re.search(r"metrics/metrics\.json: adapter\.log_loss: committed \S+, recomputed \S+", said), said


@pytest.mark.slow
def test_a_changed_probability_whose_metrics_fit_is_found_by_scoring_its_row_again(project: Project) -> None:
    changed = change_a_probability(project)
    project.dvc("commit", "--force", "infer")
    project.repro("evaluate", "report")
    commit_as_it_is(project, "Another answer, with its metrics")
    assert "verified" in verify(project)
    said = verify(project, "--rows", "12", fails=True, model=True)
    assert f"{PREDICTIONS}: row '{changed}', probability.bad: committed" in said
    assert said.count("committed") == 1, "no other row, and nothing of the base's"


def test_another_adapter_is_found_by_its_answers_though_the_lock_has_its_hash(project: Project) -> None:
    path = project.folder / WEIGHTS
    weights = {name: -tensor if "lora_B" in name else tensor for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path)
    commit_as_it_is(project, "Another adapter")
    said = verify(project, "--rows", "4", "--seed", "1", fails=True, model=True)
    assert re.search(rf"{PREDICTIONS}: row '\S+', probability\.\S+: committed \S+, re-scored \S+", said), said
    # The base's answers are those of the base all the same.
    assert re.search(r"4 test rows .* re-scored with the base: the same decisions, .* most \S+ apart .*\)\n", said), (
        said
    )


def test_an_adapter_of_other_parameters_data_base_and_code_is_found_by_its_provenance(project: Project) -> None:
    path = project.folder / "models/adapter/provenance.json"
    unlink_from_cache(path)
    provenance = read_json(path)
    provenance["parameters"]["finetune"]["learning_rate"] = 0.7
    provenance["data"]["train"]["sha256"] = "0" * 64
    provenance["base"]["files"]["config.json"] = "1" * 64
    provenance["code"] = "2" * 64
    write_json(path, provenance)
    # And code that it was not trained by; the lock says that `code` ran on it.
    project.edit_file("stages/common/training/collating.py", "IGNORED = -100", "SPARE = 1\nIGNORED = -100")
    commit_as_it_is(project, "An adapter from elsewhere")
    said = verify(project, fails=True)
    for key in ("base.files.config.json", "code", "data.train.sha256", "parameters.finetune.learning_rate"):
        assert f"models/adapter/provenance.json: {key}: " in said
    assert "learning_rate: 0.7, in the commit 0.001" in said
    assert "models/adapter/base.json is not that of models/adapter/provenance.json" in said
    assert "data/code/finetune.sha256 is not the digest of the commit's code" in said


def test_a_corrupt_object_of_the_cache_is_named_where_dvc_sees_nothing(project: Project) -> None:
    cache = project.folder / ".dvc/cache"
    listing = json.loads(object_at(cache, locked(project, "finetune", "models/adapter")).read_text(encoding="utf-8"))
    oid = next(entry["md5"] for entry in listing if entry["relpath"] == Path(WEIGHTS).name)
    path = object_at(cache, oid)
    damage(path, flipped(path.read_bytes()))
    project.dvc("checkout")
    assert "up to date" in project.dvc("status")
    said = verify(project, fails=True)
    assert "models/adapter (made by stage finetune), in the cache:" in said
    assert f"altered: {WEIGHTS}, object {oid}" in said
    assert f"rm {os.path.relpath(path, project.folder)}" in said


# --- what cannot be verified ------------------------------------------------------------------------------------------


def test_changed_files_are_refused_unless_a_commit_is_named(project: Project) -> None:
    project.edit_params("finetune.seed", 7)
    said = verify(project, fails=True)
    assert "error: these files are not as committed: params.yaml. What can be proved is a commit" in said


def test_revisions_that_are_none_get_one_message(project: Project) -> None:
    assert "error: no-such: is no commit, branch, tag or experiment of this clone" in verify(
        project, "no-such", fails=True
    )
    first = project.git("rev-list", "--max-parents=0", "HEAD").strip()
    assert "so there are no results" in verify(project, first, fails=True)


def test_objects_that_nobody_has_are_named(stored: Stored, tmp_path: Path) -> None:
    clone = stored.project.clone(tmp_path / "clone")
    remote = stored.own_folder(clone, tmp_path / "remote")
    object_at(remote, locked(clone, "evaluate", "models/decision.json")).unlink()
    said = verify(clone, fails=True)
    assert "not in the cache, and remote folder does not have it: models/decision.json." in said
    assert "has to `dvc push` it" in said
    path = object_at(remote, locked(clone, "split", "data/reports/split.json"))
    damage(path, flipped(path.read_bytes()))
    assert "data/reports/split.json: object" in (said := verify(clone, fails=True))
    assert "is damaged in remote folder, and the cache lacks it" in said
    clone.dvc("remote", "default", "--local", "--unset")
    clone.git("checkout", "-q", "HEAD~1")
    assert "not in the cache, and there is no default remote: " in verify(clone, fails=True)


@pytest.mark.slow
def test_a_base_that_cannot_be_had_is_said_and_the_rest_is_verified(project: Project) -> None:
    path = project.folder / "models/base.json"
    unlink_from_cache(path)
    pin = read_json(path)
    pin["source"]["path"] = "/nowhere"
    write_json(path, pin)
    commit_as_it_is(project, "A base that is gone")
    (project.folder / "models/base").rename(project.folder / "moved")
    said = verify(project, fails=True, model=True)
    assert "report give, byte for byte, models/decision.json" in said
    assert "error: no row could be re-scored; --no-model verifies everything else. infer could not be run on" in said
    assert "base_model.path: /nowhere is no folder here" in said
