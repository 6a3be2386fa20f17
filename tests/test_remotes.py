"""What a team does with a remote, on real servers: publish, consume, restore what a colleague ran, get by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forwarder import forward
from tests.project import Project
from tests.s3_server import S3Server
from tests.stored import ADAPTER, WEIGHTS, Stored, add_http, add_s3, add_ssh, files_in, serve_http

READ_REVISIONS = """
import sys, dvc.api
url, before, after = sys.argv[1:]
rate = lambda revision: dvc.api.params_show(repo=url, rev=revision)["finetune"]["learning_rate"]
# Keys say which file a block is from, seen from here: both splits have one of this name.
[adapter] = [block for name, block in dvc.api.metrics_show(repo=url, rev=before).items() if "/metrics.json:ada" in name]
print(rate(before), rate(after), adapter["n"])
print(dvc.api.read("models/adapter/prompt.json", repo=url, rev=before)[:1])
with dvc.api.open("models/adapter/adapter_model.safetensors", mode="rb", repo=url, rev=before) as file:
    print(len(file.read()))
"""
DECLARED = "import dvc.repo; print(dvc.repo.Repo().artifacts.read()['dvc.yaml']['adapter'].to_dict())"


def cached_files(project: Project) -> dict[str, bytes]:
    """What lies in the workspace and not in Git."""
    folders = ("data", "models")
    found = {f"{name}/{path}": data for name in folders for path, data in files_in(project.folder / name).items()}
    return {path: data for path, data in found.items() if not path.startswith("models/base/")}


@pytest.mark.parametrize("kind", ["s3", "ssh", "folder", "http"])
def test_a_fresh_clone_pulls_what_was_pushed(
    stored: Stored, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    colleague, clone = stored.project.copy(tmp_path / "own/repository"), stored.project.clone(tmp_path / "clone")
    for project in (colleague, clone):
        if kind == "s3":
            add_s3(project, request.getfixturevalue("s3_server"), "pushed")
        if kind == "ssh":
            add_ssh(project, request.getfixturevalue("ssh_server"), "pushed")
        if kind == "http":
            add_http(project, stored.http)
    if kind in ("s3", "ssh"):
        assert "files pushed" in colleague.dvc("push", "--remote", kind)
    assert "Everything is up to date" in colleague.dvc("push", "--remote", kind)
    clone.dvc("pull", "--remote", kind)
    assert cached_files(clone) == cached_files(colleague)
    assert clone.git("status", "--porcelain") == ""
    assert "are sound in remote" in clone.python("-m", "review.storage", "--remote", kind)


def test_nothing_can_be_pushed_over_http(stored: Stored, tmp_path: Path) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    (tmp_path / "web").mkdir()
    with serve_http(tmp_path / "web") as url:
        add_http(project, url)
        output = project.dvc("push", "--remote", "http", ADAPTER, fails=True)
    assert "Unsupported method" in output or "501" in output
    assert files_in(tmp_path / "web") == {}


def test_a_consumer_gets_the_adapter_alone_and_trains_nothing(
    stored: Stored, s3_server: S3Server, tmp_path: Path
) -> None:
    colleague, clone = stored.project.copy(tmp_path / "own/repository"), stored.project.clone(tmp_path / "clone")
    add_s3(colleague, s3_server, "consumed")
    colleague.dvc("push", "--remote", "s3")
    adapter = files_in(colleague.folder / ADAPTER)
    with forward(s3_server.ports["s3.port"]) as forwarder:
        add_s3(clone, s3_server, "consumed", f"http://127.0.0.1:{forwarder.port}")
        clone.dvc("remote", "default", "--local", "s3")
        clone.dvc("pull", ADAPTER)
        # Of a real adapter the listing and the answers' headers are next to nothing; of this one they are a tenth.
        overhead = 1_000 * (2 * len(adapter) + 4)
        assert forwarder.received < 1.1 * sum(map(len, adapter.values())) + overhead
        assert files_in(clone.folder / ADAPTER) == adapter
        cache = files_in(clone.folder / ".dvc/cache/files")
        assert sum(map(len, cache.values())) < 1.1 * sum(map(len, adapter.values()))
        assert not (clone.folder / "data/splits").exists()
        assert clone.repro("--pull", "--allow-missing") == set()
        # Without the options missing tables are made again, and training finds that they are what it had.
        assert clone.repro("finetune") == {"code", "base_model", "ingest", "format_prompts", "split"}
    assert files_in(clone.folder / ADAPTER) == adapter
    assert clone.git("status", "--porcelain") == ""


@pytest.fixture(scope="module")
def colleague(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone of a shared Git repository in which another learning rate was run as an experiment, then pushed."""
    folder = tmp_path_factory.mktemp("colleague")
    stored.project.git("clone", "-q", "--bare", ".", str(folder / "shared.git"))
    project = Project(folder / "clone")
    project.folder.mkdir()
    project.git("clone", "-q", str(folder / "shared.git"), ".")
    project.git("config", "user.name", "T")
    project.git("config", "user.email", "t@example.org")
    stored.own_folder(project, folder / "remote")
    project.dvc("pull")
    project.dvc("exp", "run", "-n", "faster", "-S", "finetune.learning_rate=0.002", "finetune")
    return project


def other_clone(colleague: Project, folder: Path) -> Project:
    """What another colleague clones from the shared Git repository, with the same remote."""
    folder.mkdir(parents=True)
    clone = Project(folder)
    clone.git("clone", "-q", str(colleague.folder.parent / "shared.git"), ".")
    clone.dvc("remote", "modify", "--local", "folder", "url", str(colleague.folder.parent / "remote"))
    return clone


def test_what_a_colleague_ran_and_pushed_with_the_run_cache_is_restored_without_training(
    colleague: Project, tmp_path: Path
) -> None:
    colleague.dvc("push", "--run-cache")
    clone = other_clone(colleague, tmp_path / "clone")
    clone.edit_params("finetune.learning_rate", 0.002)
    output = clone.dvc("repro", "--pull", "--allow-missing", "finetune")
    assert "Running stage" not in output
    assert "Stage 'finetune' is cached - skipping run" in output
    assert (clone.folder / WEIGHTS).read_bytes() == (colleague.folder / WEIGHTS).read_bytes()


def test_a_pushed_experiment_is_applied_without_training(colleague: Project, tmp_path: Path) -> None:
    colleague.dvc("exp", "push", "origin", "faster")
    clone = other_clone(colleague, tmp_path / "clone")
    assert "faster" in clone.dvc("exp", "list", "origin")
    clone.dvc("exp", "pull", "origin", "faster")
    clone.dvc("exp", "apply", "faster")
    assert "learning_rate: 0.002" in (clone.folder / "params.yaml").read_text()
    assert (clone.folder / WEIGHTS).read_bytes() == (colleague.folder / WEIGHTS).read_bytes()
    assert clone.repro("--pull", "--allow-missing", "finetune") == set()


def test_an_adapter_is_got_by_name_and_version_from_another_repository(stored: Stored, tmp_path: Path) -> None:
    project, elsewhere = stored.project.copy(tmp_path / "own/repository"), Project(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    project.git("tag", "-a", "adapter@v1.0.0", "-m", "First adapter")
    project.edit_params("finetune.learning_rate", 0.002)
    project.git("commit", "-qam", "Try another rate")
    url = project.folder.as_uri()
    elsewhere.dvc("artifacts", "get", url, "adapter", "--rev", "v1.0.0", "-o", "adapter")
    assert files_in(elsewhere.folder / "adapter") == files_in(project.folder / ADAPTER)
    refused = elsewhere.dvc("artifacts", "get", url, "adapter", "--rev", "v2.0.0", "-o", "other", fails=True)
    assert "Unable to find artifact 'adapter @ v2.0.0'" in refused
    printed = elsewhere.python("-c", READ_REVISIONS, url, "adapter@v1.0.0", "main").splitlines()
    assert printed == ["0.001 0.002 12", "{", str((project.folder / WEIGHTS).stat().st_size)]


def test_the_artifact_is_declared_and_is_nothing_that_dvc_watches(stored: Stored, tmp_path: Path) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    found = project.python("-c", DECLARED)
    for word in ("'path': 'models/adapter'", "'type': 'model'", "'lora'", "'text-classification'", "LoRA adapter with"):
        assert word in found
    assert "Data and pipelines are up to date" in project.dvc("status")
    path = project.folder / "dvc.yaml"
    path.write_text(path.read_text(encoding="utf-8").split("\nartifacts:\n")[0], encoding="utf-8")
    assert "Data and pipelines are up to date" in project.dvc("status")
