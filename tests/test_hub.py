"""huggingface_hub is real, in a process of its own as its endpoint is read at import; the Hub is a server made here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, READ_TOKEN, TOKEN, endpoint_of, serve
from tests.workplace import REVIEWS, make_workplace, reviews

FILES = {"data/train.csv": b"id,text,label\n1,good,positive\n", "data/test.csv": b"x", "README.md": b"# card"}

DOWNLOAD = """
import sys
from stages.common.errors import run_stage
from stages.common.sources.hub import download_repository, require_commit
def main():
    repo_id, revision, folder = sys.argv[1:]
    require_commit(repo_id, revision, "dataset", "ingest.source.revision")
    from pathlib import Path
    root = download_repository(repo_id, revision, "dataset", ["data/*.csv"], Path(folder) if folder else None)
    print("\\n".join(sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())))
run_stage(main)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve(FILES) as hub:
        yield endpoint_of(hub)


def download(
    home: Path, endpoint: str, repo_id: str, revision: str, folder: Path | str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, repo_id, revision, str(folder)],
        env=clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wanted_files_of_a_commit_are_downloaded_and_nothing_beside_them(endpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    result = download(tmp_path, endpoint, "some/set", COMMIT, folder)
    assert result.stdout.split() == ["data/test.csv", "data/train.csv"], result.stderr
    assert (folder / "data" / "train.csv").read_bytes() == FILES["data/train.csv"]


def test_without_a_folder_the_next_run_needs_no_network(endpoint: str, tmp_path: Path) -> None:
    assert download(tmp_path, endpoint, "some/set", COMMIT).returncode == 0
    result = download(tmp_path, endpoint, "some/set", COMMIT, HF_HUB_OFFLINE="1")
    assert result.stdout.split() == ["data/test.csv", "data/train.csv"], result.stderr


def test_a_token_opens_a_gated_repository_and_is_neither_printed_nor_stored(endpoint: str, tmp_path: Path) -> None:
    result = download(tmp_path, endpoint, "gated/set", COMMIT, HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_token_stored_on_the_machine_is_not_used(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    assert download(tmp_path, endpoint, "gated/set", COMMIT).returncode == 1


@pytest.mark.parametrize(
    ("repo_id", "revision", "expected"),
    [
        ("some/set", "main", f"ingest.source.revision: 'main' is not a commit of 40 hexadecimal digits, and can point "
         f"to something else tomorrow. It points to {COMMIT} now: put that there."),
        ("some/set", "v9", "has no such revision"),
        ("some/set", "f" * 40, "has no such revision"),
        ("gated/set", COMMIT, "/datasets/gated/set: is only for accounts that accepted its licence, and HF_TOKEN is "
         "not set. Accept the licence on that page, then set HF_TOKEN to a token of the same account with read access"),
        ("missing/set", COMMIT, "/datasets/missing/set: there is no such dataset, or it is private"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_ends_in_one_message(
    endpoint: str, tmp_path: Path, repo_id: str, revision: str, expected: str
) -> None:
    result = download(tmp_path, endpoint, repo_id, revision)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (READ_TOKEN, "/datasets/gated/set: is only for accounts that accepted its licence, and the account of the "
         "token in HF_TOKEN was not let in. Accept the licence on that page with that account"),
        ("hf_wrong", "/datasets/gated/set: the token in HF_TOKEN is not accepted. Make a new one with read access."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_folder", [True, False])
def test_a_token_that_opens_nothing_is_told_from_none(
    endpoint: str, tmp_path: Path, in_folder: bool, token: str, expected: str
) -> None:
    result = download(tmp_path, endpoint, "gated/set", COMMIT, tmp_path / "files" if in_folder else "", HF_TOKEN=token)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert expected in result.stderr
    assert token not in result.stdout + result.stderr


def test_ingest_reads_a_gated_set_with_a_token_and_names_page_and_token_without(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "project")
    (place.folder / REVIEWS).unlink()
    source = {"kind": "hub", "repo_id": "gated/reviews", "revision": COMMIT, "paths": ["*.csv"], "format": None}
    place.set("ingest.source", source)
    with serve({"reviews.csv": reviews().encode()}) as hub:
        own = {"HF_ENDPOINT": endpoint_of(hub), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        refused = place.run("stages.ingest", **own)
        assert (refused.returncode, (place.folder / "data/records.parquet").exists()) == (1, False)
        page = f"{endpoint_of(hub)}/datasets/gated/reviews"
        assert f"{page}: is only for accounts that accepted its licence, and HF_TOKEN is not set" in refused.stderr
        accepted = place.run("stages.ingest", **own, HF_TOKEN=TOKEN)
    assert accepted.returncode == 0, accepted.stderr
    assert (place.folder / "data/records.parquet").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# A connection refused while downloading takes huggingface_hub's own 5 retries (26 s), so that case is offline mode.
@pytest.mark.parametrize(("revision", "environment"), [("main", {}), (COMMIT, {"HF_HUB_OFFLINE": "1"})])
def test_a_hub_that_cannot_be_reached_is_said_to_be(tmp_path: Path, revision: str, environment: dict[str, str]) -> None:
    result = download(tmp_path, "http://127.0.0.1:9", "some/set", revision, **environment)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "could not be fetched" in result.stderr
    assert ("not a commit" in result.stderr) == (revision == "main")
