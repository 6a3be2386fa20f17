"""A push is real but for the Hub, which is a server on this machine: huggingface_hub, PEFT and DVC do what they do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.common.training.adapter_folder import published_base
from tests.hub_server import READ_TOKEN, TOKEN, Commit, Hub, endpoint_of, serve
from tests.workplace import Workplace

REPOSITORY = "me/adapter"
CARD = "---\nlibrary_name: peft\n---\n\n# tiny: classification adapter\n\nTrained on 80 rows (SHA-256 `ab12`)."
RESULTS = "\n\n## Results\n\n0.800\n"
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3])
"""


def save_adapter(folder: Path, base: Path) -> None:
    """What `finetune` leaves: a LoRA adapter as PEFT saves it, the tokenizer, and what describes them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    pin = {"source": {"source": "hub", "repo_id": "some/base", "revision": "a" * 40}, "commit": "a" * 40, "files": {}}
    contents: dict[str, Any] = {
        "base.json": pin, "prompt.json": {"exemplars": []}, "provenance.json": {"base": pin},
        "training_log/summary.json": {"steps": 6}, "training_log/metrics.json": {"step": 6},
    }  # fmt: skip
    for name, value in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "training_log/plots/metrics/train").mkdir(parents=True)
    (folder / "training_log/plots/metrics/train/loss.tsv").write_text("step\tloss\n1\t2.5\n")
    (folder / "README.md").write_text(CARD + "\n")


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A project whose adapter and card are made and committed to DVC; to be copied, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    save_adapter(folder / "models/adapter", base_folder)
    (folder / "metrics").mkdir()
    (folder / "metrics/model_card.md").write_text(CARD + RESULTS)
    (folder / "dvc.yaml").write_text("stages:\n  finetune:\n    cmd: 'true'\n    outs: [models/adapter]\n")
    dvc(folder, "init", "--no-scm", "--quiet")
    dvc(folder, "commit", "--force", "--quiet", "finetune")
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Workplace:
    return Workplace(Path(shutil.copytree(finished, tmp_path / "project")))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({"README.md": b"# somebody's"}) as hub:
        yield hub


def push(
    place: Workplace, hub: Hub | None, *arguments: str, token: str | None = TOKEN, **environment: str
) -> tuple[int, str]:
    """Exit code and all output of a push, whose Hub is `hub`; None: nobody listens there."""
    own = {
        "HF_ENDPOINT": endpoint_of(hub) if hub else "http://127.0.0.1:9",
        "HF_HOME": str(place.folder.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        # The server knows Git LFS, not Xet, which has a store of its own.
        "HF_HUB_DISABLE_XET": "1",
    }
    if token:
        own["HF_TOKEN"] = token
    result = place.run("serving.push", *arguments, **(own | environment))
    output = result.stdout + result.stderr
    # huggingface_hub logs its caught errors there.
    assert "HF_DEBUG" in environment or "Traceback" not in output, output
    return result.returncode, output


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if ".cache" not in name and name[0] != "."}


def commits(hub: Hub) -> list[Commit]:
    """All but the first, which the Hub makes."""
    return hub.repositories[REPOSITORY].commits[1:] if REPOSITORY in hub.repositories else []


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_what_was_pushed_comes_back_byte_for_byte_and_loads(place: Workplace, hub: Hub) -> None:
    code, output = push(place, hub, REPOSITORY, "--revision-message", "First try")
    assert code == 0, output
    [commit] = commits(hub)
    assert f"{endpoint_of(hub)}/{REPOSITORY}: pushed as commit {commit.id}" in output
    assert "warning" not in output
    copy = place.folder.parent / "copy"
    place.write("download.py", DOWNLOAD)
    environment = {"HF_ENDPOINT": endpoint_of(hub), "HF_HOME": str(place.folder.parent / "home"), "HF_HUB_OFFLINE": "0"}
    result = place.run("download", REPOSITORY, commit.id, str(copy), **environment)
    assert result.returncode == 0, result.stderr
    card = (place.folder / "metrics/model_card.md").read_bytes()
    assert contents(copy) == contents(place.folder / "models/adapter") | {"README.md": card}

    from peft import PeftConfig
    from safetensors.numpy import load_file

    assert PeftConfig.from_pretrained(str(copy)).peft_type == "LORA"
    assert load_file(copy / "adapter_model.safetensors").keys()


def test_the_weights_travel_as_a_git_lfs_object_and_the_rest_inside_one_commit(place: Workplace, hub: Hub) -> None:
    assert push(place, hub, REPOSITORY, "--revision-message", "First try")[0] == 0
    weights = (place.folder / "models/adapter/adapter_model.safetensors").read_bytes()
    assert list(hub.objects.values()) == [weights]
    [commit] = commits(hub)
    assert sorted(commit.sent) == sorted(contents(place.folder / "models/adapter"))
    lock = (place.folder / "dvc.lock").read_text(encoding="utf-8")
    subject, details = commit.message.split("\n\n")
    assert subject == "First try"
    assert details.removeprefix("models/adapter in dvc.lock: ") in lock


def test_a_second_push_is_a_commit_of_what_changed(place: Workplace, hub: Hub) -> None:
    assert push(place, hub, REPOSITORY)[0] == 0
    place.write("metrics/model_card.md", CARD + RESULTS + "Once more.\n")
    (place.folder / "models/adapter/training_log/metrics.json").write_text("{}")
    (place.folder / "models/adapter/chat_template.jinja").unlink()
    assert push(place, hub, REPOSITORY)[0] == 0
    changed = ["README.md", "chat_template.jinja", "training_log/metrics.json"]
    assert sorted(commits(hub)[1].sent) == changed
    assert "chat_template.jinja" not in commits(hub)[1].files


def test_an_equal_adapter_makes_no_commit(place: Workplace, hub: Hub) -> None:
    assert push(place, hub, REPOSITORY)[0] == 0
    code, output = push(place, hub, REPOSITORY)
    assert (code, len(commits(hub))) == (0, 1)
    assert f"nothing to push: it already holds this adapter at commit {commits(hub)[0].id}" in output


def test_what_others_put_into_the_repository_stays(place: Workplace, hub: Hub) -> None:
    hub.add(REPOSITORY)
    hub.repositories[REPOSITORY].commits[-1].files["LICENSE"] = b"MIT"
    assert push(place, hub, REPOSITORY)[0] == 0
    assert {"LICENSE", ".gitattributes", "adapter_config.json"} <= commits(hub)[0].files.keys()


def test_a_new_repository_is_private_on_demand(place: Workplace, hub: Hub) -> None:
    assert push(place, hub, REPOSITORY, "--private")[0] == 0
    assert hub.repositories[REPOSITORY].private
    assert push(place, hub, "me/other")[0] == 0
    assert not hub.repositories["me/other"].private


def test_a_public_repository_gets_nothing_that_was_to_be_private(place: Workplace, hub: Hub) -> None:
    hub.add(REPOSITORY)
    code, output = push(place, hub, REPOSITORY, "--private")
    assert (code, commits(hub), hub.objects) == (1, [], {})
    assert "exists and is public. Nothing was pushed" in output


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_login", [False, True])
def test_a_token_is_neither_printed_nor_stored_nor_pushed(place: Workplace, hub: Hub, by_login: bool) -> None:
    stored = place.folder.parent / "home/token"
    if by_login:
        stored.parent.mkdir()
        stored.write_text(TOKEN)
    code, output = push(place, hub, REPOSITORY, token=None if by_login else TOKEN, HF_DEBUG="1")
    assert code == 0, output
    files = [path for path in place.folder.parent.rglob("*") if path.is_file() and path != stored]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not any(TOKEN.encode() in content for content in commits(hub)[0].files.values())
    assert "authorization: <TOKEN>" in output
    assert TOKEN not in output


@pytest.mark.parametrize(
    ("repository", "token", "expected"),
    [
        (REPOSITORY, None, "there is no token to push to me/adapter with. Set HF_TOKEN to one with write access"),
        (REPOSITORY, "hf_wrong", "/me/adapter: the token is not accepted. Make one with write access at"),
        ("guest/adapter", READ_TOKEN, "the token of account guest may only read. Make one with write access at"),
        ("missing/adapter", READ_TOKEN, "the token of account guest may only read"),
        ("other/adapter", TOKEN, "the token of account me may not write to repositories of other. Push to me/NAME"),
        ("missing/adapter", TOKEN, "the token of account me may not write to repositories of missing"),
    ],
)
def test_who_may_not_write_is_told_why(
    place: Workplace, hub: Hub, repository: str, token: str | None, expected: str
) -> None:
    code, output = push(place, hub, repository, token=token)
    assert (code, hub.repositories, hub.objects) == (1, {}, {})
    assert expected in output
    assert output.count("error: ") == 1
    assert (token or "no token") not in output.replace("there is no token", "")


# --- what is refused before anything is sent --------------------------------------------------------------------------


def refused(place: Workplace, capfd: pytest.CaptureFixture[str], repository: str = REPOSITORY) -> str:
    """The message of a push that ends before it looks for a token or a Hub."""
    assert place.main("serving.push", repository) == 1
    message = capfd.readouterr().err
    assert "token" not in message
    return message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter", "'adapter' must be OWNER/NAME, as my-account/adapter"),
        ("me/my adapter", "'me/my adapter' cannot name a repository on the Hub: "),
        ("https://huggingface.co/me/adapter", "cannot name a repository on the Hub: "),
    ],
)
def test_a_name_that_is_none_is_refused(
    place: Workplace, capfd: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    assert expected in refused(place, capfd, name)


def test_an_absent_adapter_or_card_is_said_with_the_command_that_makes_it(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.folder / "metrics/model_card.md").unlink()
    assert "metrics/model_card.md: there is no model card. `dvc repro report` makes it" in refused(place, capfd)
    shutil.rmtree(place.folder / "models")
    expected = "`dvc repro finetune` makes it; `dvc pull models/adapter` fetches the one that dvc.lock names"
    assert expected in refused(place, capfd)


def test_a_card_of_another_adapter_is_refused(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    place.write("metrics/model_card.md", CARD.replace("ab12", "cd34") + RESULTS)
    assert "tells the results of another adapter than models/adapter holds. Run `dvc repro r" in refused(place, capfd)


def test_an_incomplete_adapter_is_refused(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    (place.folder / "models/adapter/adapter_model.safetensors").unlink()
    assert "models/adapter: lacks adapter_model.safetensors. Restore it" in refused(place, capfd)


@pytest.mark.parametrize("name", [".env", ".git/config", "training_log/.hidden.json", "train.parquet", "optimizer.pt"])
def test_nothing_beside_the_adapter_is_ever_sent(
    place: Workplace, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    place.write(f"models/adapter/{name}", "secret")
    expected = f"holds what is no part of an adapter: {name}. Nothing was pushed"
    assert expected in refused(place, capfd)
    dvc(place.folder, "commit", "--force", "--quiet", "finetune")
    assert expected in refused(place, capfd)


@pytest.mark.parametrize("name", ["training_log/notes.json", "training_log/more"])
def test_a_link_out_of_the_folder_is_refused(place: Workplace, capfd: pytest.CaptureFixture[str], name: str) -> None:
    outside = place.folder.parent / "outside"
    outside.mkdir()
    (outside / "notes.json").write_text("secret")
    target = outside if name.endswith("more") else outside / "notes.json"
    (place.folder / "models/adapter" / name).symlink_to(target)
    assert f"models/adapter/{name}: is a link to something outside models/adapter" in refused(place, capfd)


def test_the_links_that_dvc_itself_makes_are_followed(place: Workplace, hub: Hub) -> None:
    expected = contents(place.folder / "models/adapter")
    dvc(place.folder, "config", "cache.type", "symlink")
    shutil.rmtree(place.folder / "models/adapter")
    dvc(place.folder, "checkout", "--quiet")
    assert (place.folder / "models/adapter/adapter_config.json").is_symlink()
    code, output = push(place, hub, REPOSITORY)
    assert code == 0, output
    pushed = commits(hub)[0].files
    assert {name: pushed[name] for name in expected if name != "README.md"} == {
        name: content for name, content in expected.items() if name != "README.md"
    }


# --- what is only said ------------------------------------------------------------------------------------------------


def test_an_adapter_that_dvc_lock_does_not_name_is_pushed_with_a_warning(place: Workplace, hub: Hub) -> None:
    (place.folder / "models/adapter/training_log/metrics.json").write_text("{}")
    code, output = push(place, hub, REPOSITORY)
    assert code == 0
    assert "warning: models/adapter is not what dvc.lock names" in output
    shutil.rmtree(place.folder / ".dvc")
    code, output = push(place, hub, REPOSITORY)
    assert (code, "warning: models/adapter is not what dvc.lock names" in output) == (0, True)


def test_a_base_from_a_local_folder_is_warned_of(place: Workplace, hub: Hub) -> None:
    base = published_base({"source": {"source": "folder", "path": "/mnt/models/tiny"}})
    place.write("models/adapter/base.json", json.dumps(base))
    code, output = push(place, hub, REPOSITORY)
    assert code == 0
    assert "warning: the base model came from a folder named 'tiny' on the machine that trained" in output
    assert "/mnt" not in output


def test_texts_of_the_data_inside_the_prompt_are_warned_of(place: Workplace, hub: Hub) -> None:
    exemplars = [{"text": "the fine film", "label": "good"}, {"text": "the poor film", "label": "bad"}]
    place.write("models/adapter/prompt.json", json.dumps({"exemplars": exemplars}))
    code, output = push(place, hub, REPOSITORY)
    assert code == 0
    assert "warning: prompt.json shows the 2 texts of the data that stand in each prompt as examples" in output


# --- the Hub fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offline", "expected"),
    [("0", "the push was not finished ("), ("1", "cannot be reached with HF_HUB_OFFLINE set. Unset it")],
)
def test_a_hub_that_cannot_be_reached_is_said_to_be(place: Workplace, offline: str, expected: str) -> None:
    code, output = push(place, None, REPOSITORY, HF_HUB_OFFLINE=offline)
    assert (code, expected in output) == (1, True), output


def test_a_failed_upload_leaves_no_commit_and_the_next_push_is_whole(place: Workplace, hub: Hub) -> None:
    hub.full = True
    code, output = push(place, hub, REPOSITORY)
    assert (code, commits(hub)) == (1, [])
    assert "the push was not finished (" in output
    hub.full = False
    assert push(place, hub, REPOSITORY)[0] == 0
    assert sorted(commits(hub)[0].sent) == sorted(contents(place.folder / "models/adapter"))


def test_a_hub_without_xet_ends_in_a_message_too(place: Workplace, hub: Hub) -> None:
    code, output = push(place, hub, REPOSITORY, HF_HUB_DISABLE_XET="0")
    assert (code, commits(hub)) == (1, [])
    assert "the push was not finished (" in output


def test_metadata_that_the_hub_refuses_is_said_to_be_the_cards(place: Workplace, hub: Hub) -> None:
    place.write("metrics/model_card.md", CARD.partition("---\n\n")[2] + RESULTS)
    code, output = push(place, hub, REPOSITORY)
    assert (code, commits(hub)) == (1, [])
    assert "metrics/model_card.md: the Hub refuses its metadata" in output
