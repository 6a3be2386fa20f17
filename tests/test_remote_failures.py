"""Remotes fail for real: servers are killed, keys are wrong, objects rot. Nothing is lost; messages say what to do."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.forwarder import forward
from tests.project import DVC, Project
from tests.s3_server import S3Server
from tests.ssh_server import SshServer
from tests.stored import (
    ADAPTER,
    WEIGHTS,
    Stored,
    add_s3,
    add_ssh,
    damage,
    files_in,
    flipped,
    locked,
    object_at,
)


def check(project: Project, *arguments: str, fails: bool = False) -> str:
    """What the project's own check of cache or remote says."""
    return project.python("-m", "review.storage", *arguments, fails=fails)


def adapter_is_whole(project: Project, like: Project) -> bool:
    return files_in(project.folder / ADAPTER) == files_in(like.folder / ADAPTER)


# --- servers and keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["s3", "ssh"])
def test_a_push_whose_server_dies_fails_and_the_next_one_completes_it(
    stored: Stored, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    project, clone = stored.project.copy(tmp_path / "own/repository"), stored.project.clone(tmp_path / "clone")
    server: S3Server | SshServer = request.getfixturevalue(f"{kind}_server")
    with forward(server.ports["s3.port"] if isinstance(server, S3Server) else server.port) as forwarder:
        for one in (project, clone):
            if isinstance(server, S3Server):
                add_s3(one, server, "interrupted", f"http://127.0.0.1:{forwarder.port}")
            else:
                add_ssh(one, server, "interrupted", forwarder.port)
        # The weights alone are 130 kB. Amazon's library would try each file five times, ever more slowly.
        forwarder.cut_after, forwarder.cut = 100_000, server.kill
        project.environment["AWS_MAX_ATTEMPTS"] = "1"
        assert "failed to push data to the cloud" in project.dvc("push", "--remote", kind, ADAPTER, fails=True)
        assert forwarder.sent > 100_000
        assert "are sound in the cache" in check(project)
        server.start()
        assert "pushed" in project.dvc("push", "--remote", kind)
        clone.dvc("pull", "--remote", kind, ADAPTER)
        assert adapter_is_whole(clone, project)
        assert "are sound in remote" in check(project, "--remote", kind)


@pytest.mark.parametrize("kind", ["s3", "ssh"])
def test_wrong_keys_are_refused_with_a_message_and_nothing_is_changed(
    stored: Stored, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    if kind == "s3":
        add_s3(project, request.getfixturevalue("s3_server"), "refused")
        project.dvc("remote", "modify", "--local", "s3", "secret_access_key", "not-the-secret")
    else:
        server = request.getfixturevalue("ssh_server")
        add_ssh(project, server, "refused")
        project.dvc("remote", "modify", "--local", "ssh", "keyfile", str(server.folder / "strange_key"))
    refusal = {"s3": "Forbidden", "ssh": "Permission denied"}[kind]
    assert refusal in project.dvc("push", "--remote", kind, fails=True)
    clone = stored.project.clone(tmp_path / "clone")
    shutil.copy(project.folder / ".dvc/config.local", clone.folder / ".dvc")
    assert refusal in clone.dvc("pull", "--remote", kind, fails=True)
    output = check(project, "--remote", kind, fails=True)
    assert output.startswith(f"error: remote '{kind}' cannot be read")
    assert refusal in output
    assert "are sound in the cache" in check(project)


def test_two_pushes_at_once_leave_a_complete_remote(stored: Stored, tmp_path: Path) -> None:
    first = stored.project.copy(tmp_path / "first/repository")
    second = stored.project.copy(tmp_path / "second/repository")
    for project in (first, second):
        project.dvc("remote", "modify", "--local", "folder", "url", str(tmp_path / "remote"))
    pushes = [project.start(DVC, "push") for project in (first, second, first)]
    outputs = [push.communicate()[0] for push in pushes]
    # Of two in one clone the second may be told that the first is at work.
    for push, output in zip(pushes, outputs, strict=True):
        assert push.returncode == 0 or "Unable to acquire lock" in output, output
    assert [push.returncode for push in pushes].count(0) >= 2
    assert "are sound in remote" in check(first, "--remote", "folder")


# --- objects of a remote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_bad_object_of_a_remote_is_not_pulled_but_named_and_can_be_mended(
    stored: Stored, tmp_path: Path, kind: str
) -> None:
    project, clone = stored.project.copy(tmp_path / "own/repository"), stored.project.clone(tmp_path / "clone")
    remote = stored.own_folder(project, tmp_path / "remote")
    clone.dvc("remote", "modify", "--local", "folder", "url", str(remote))
    content = (project.folder / WEIGHTS).read_bytes()
    [bad] = [path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == content]
    oid = bad.parent.name + bad.name
    if kind == "missing":
        bad.unlink()
    else:
        damage(bad, flipped(content) if kind == "flipped" else content[:1_000])
    output = clone.dvc("pull", ADAPTER, fails=True)
    assert "failed to pull data from the cloud" in output
    assert not (clone.folder / WEIGHTS).exists()

    output = check(clone, "--remote", "folder", fails=True)
    assert "models/adapter (made by stage finetune), in remote folder:" in output
    assert f"{'missing' if kind == 'missing' else 'altered'}: {WEIGHTS}, object {oid}" in output
    assert "`dvc push --remote folder` from a clone whose cache has it; where nobody has it, `dvc repro" in output
    assert output.count("made by stage") == 1

    if kind == "truncated":
        return
    # Neither a push nor anything else that DVC offers mends it; what the check says does.
    assert "Everything is up to date" in project.dvc("push")
    output = check(project, "--remote", "folder", fails=True)
    [remedy] = [line for line in output.splitlines() if line.startswith("  do: ")]
    doomed = [Path(word.strip(",")) for word in remedy.split() if word.startswith("/")]
    assert len(doomed) == (1 if kind == "missing" else 2)
    assert remedy.endswith("then `dvc push --remote folder`")
    for path in doomed:
        path.unlink()
    project.dvc("push", "--remote", "folder")
    assert "are sound in remote folder" in check(project, "--remote", "folder")
    clone.dvc("pull", ADAPTER)
    assert adapter_is_whole(clone, project)


def test_a_truncated_table_and_a_damaged_list_of_a_directory_are_named(stored: Stored, tmp_path: Path) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    remote = stored.own_folder(project, tmp_path / "remote")
    table, splits = locked(project, "ingest", "data/records.parquet"), locked(project, "split", "data/splits")
    size = object_at(remote, table).stat().st_size
    damage(object_at(remote, table), object_at(remote, table).read_bytes()[:200])
    damage(object_at(remote, splits), b"[]")
    output = check(project, "--remote", "folder", fails=True)
    assert f"  truncated (200 of {size:,} bytes): data/records.parquet, object {table}" in output
    assert f"  altered: data/splits, object {splits}" in output
    assert "made by stage ingest" in output
    assert "made by stage split" in output
    assert "error: outputs that lack sound objects in remote folder: 2," in output


# --- objects of the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", ["sound", "damaged", "changed"])
def test_a_bad_object_of_the_cache_is_named_and_can_be_mended_without_touching_changes(
    stored: Stored, tmp_path: Path, workspace: str
) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    content = (project.folder / WEIGHTS).read_bytes()
    cache = project.folder / ".dvc/cache"
    [bad] = [path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == content]
    damage(bad, flipped(content))
    if workspace == "damaged":
        (project.folder / WEIGHTS).unlink()
        project.dvc("checkout", ADAPTER)
        assert (project.folder / WEIGHTS).read_bytes() == flipped(content)
    if workspace == "changed":
        (project.folder / WEIGHTS).unlink()
        (project.folder / WEIGHTS).write_bytes(b"my own")
        output = check(project, fails=True)
        assert f"do: `rm {bad.relative_to(project.folder)}`, then `dvc pull {ADAPTER}`; where" in output
        return
    # This is why there is a check.
    assert "Data and pipelines are up to date" in project.dvc("status")
    output = check(project, fails=True)
    assert "models/adapter (made by stage finetune), in the cache:" in output
    assert f"  altered: {WEIGHTS}, object {bad.parent.name}{bad.name}" in output
    name = bad.relative_to(project.folder)
    if workspace == "sound":
        assert f"do: `rm {name}`, then `dvc commit finetune`" in output
        bad.unlink()
        project.dvc("commit", "finetune")
    else:
        assert f"do: `rm {name} {WEIGHTS}`, then `dvc pull {ADAPTER}`; where no remote has it, `dvc repro fi" in output
        bad.unlink()
        (project.folder / WEIGHTS).unlink()
        project.dvc("pull", ADAPTER)
    assert "are sound in the cache" in check(project)
    assert (project.folder / WEIGHTS).read_bytes() == content
    assert project.git("status", "--porcelain") == ""


def test_a_lost_object_of_the_cache_whose_file_differs_is_fetched_and_replaces_the_file_only_when_told(
    stored: Stored, tmp_path: Path
) -> None:
    project = stored.project.copy(tmp_path / "own/repository")
    content = (project.folder / WEIGHTS).read_bytes()
    object_at(project.folder / ".dvc/cache", hashlib.md5(content).hexdigest()).unlink()
    (project.folder / WEIGHTS).unlink()
    (project.folder / WEIGHTS).write_bytes(b"my own")
    output = check(project, fails=True)
    assert f"  not what dvc.lock names either, in the workspace: {WEIGHTS}\n" in output
    assert f"then `dvc checkout --force {ADAPTER}`, which replaces what is here; to keep that, copy it else" in output
    assert "`rm" not in output
    # What the check says about DVC is so.
    assert "unsaved files" in project.dvc("pull", ADAPTER, fails=True)
    assert (project.folder / WEIGHTS).read_bytes() == b"my own"
    assert "sound in the cache; files in the workspace were not looked at: `dvc status` does" in check(project)
    project.dvc("checkout", "--force", ADAPTER)
    assert (project.folder / WEIGHTS).read_bytes() == content


def test_a_remote_whose_folder_is_not_there_is_one_message_and_an_empty_folder_is_not(
    stored: Stored, tmp_path: Path
) -> None:
    project, share = stored.project.copy(tmp_path / "own/repository"), tmp_path / "share"
    project.dvc("remote", "modify", "--local", "folder", "url", str(share))
    output = check(project, "--remote", "folder", fails=True)
    assert output == f"error: {share} is not there: is it mounted? (remote folder in .dvc/config)\n"
    share.mkdir()
    assert "do: `dvc push --remote folder`" in check(project, "--remote", "folder", fails=True)


def test_the_check_says_who_makes_what_a_clone_lacks_and_which_remotes_there_are_not(
    stored: Stored, tmp_path: Path
) -> None:
    clone = stored.project.clone(tmp_path / "clone")
    output = check(clone, fails=True)
    assert "do: `dvc pull models/base.json`; where no remote has it, `dvc repro base_model`" in output
    assert "Traceback" not in output
    (clone.folder / "notes.txt").write_text("what we know")
    clone.dvc("add", "notes.txt")
    [own] = [path for path in (clone.folder / ".dvc/cache/files").rglob("*") if path.is_file()]
    own.unlink()
    assert "notes.txt (added by notes.txt.dvc), in the cache:" in (output := check(clone, fails=True))
    assert "do: `dvc commit notes.txt.dvc` puts the workspace's sound files into the cache" in output
    assert "remote 'none' doesn't exist" in check(clone, "--remote", "none", fails=True)
    (clone.folder / "dvc.lock").unlink()
    (clone.folder / "notes.txt.dvc").unlink()
    assert check(clone, fails=True) == "error: dvc.lock names no object yet. `dvc repro` runs the pipeline.\n"
