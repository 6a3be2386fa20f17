"""pip is real; it finds packages made here in a folder, never a network."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.common.schema.ingest import PackageSource
from stages.common.sources.packages import _explain, fetch_package_member, unpack_member

TABLE = b"1\t0.5\tfine\n"


def tar_bytes(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_wheel(folder: Path, version: str = "1.0") -> Path:
    information = f"tiny_data-{version}.dist-info"
    path = folder / f"tiny_data-{version}-py3-none-any.whl"
    path.write_bytes(
        zip_bytes(
            {
                "tiny_data/data.tar.gz": tar_bytes({"inside/table.tsv": TABLE, "inside/other.tsv": b"x"}),
                "tiny_data/table.csv": b"id,text\n",
                f"{information}/METADATA": f"Metadata-Version: 2.1\nName: tiny-data\nVersion: {version}\n".encode(),
                f"{information}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{information}/RECORD": b"",
            }
        )
    )
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(archive: Path, **changes: object) -> PackageSource:
    values = {
        "kind": "package",
        "requirement": "tiny-data==1.0",
        "distribution": "wheel",
        "sha256": sha256(archive),
        "member": ["tiny_data/data.tar.gz", "inside/table.tsv"],
        "format": None,
    }
    return PackageSource.model_validate(values | changes)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that pip looks into instead of an index; temporary files go beside it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder, temporary = tmp_path / "wheels", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def test_a_member_of_an_archive_inside_a_wheel_is_fetched_and_removed_afterwards(wheels: Path, tmp_path: Path) -> None:
    with fetch_package_member(source(make_wheel(wheels))) as path:
        assert path.name == "table.tsv"
        assert path.read_bytes() == TABLE
        assert list(path.parent.iterdir()) == [path]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_source_distribution_is_fetched(wheels: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "extra").mkdir(parents=True)
    (project / "setup.py").write_text("from setuptools import setup\nsetup(name='tiny-data', version='1.0')\n")
    (project / "extra" / "table.tsv").write_bytes(TABLE)
    (project / "MANIFEST.in").write_text("graft extra\n")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(wheels)], cwd=project, check=True)
    (archive,) = wheels.iterdir()
    wanted = source(archive, distribution="sdist", member=["tiny_data-1.0/extra/table.tsv"])
    with fetch_package_member(wanted) as path:
        assert path.read_bytes() == TABLE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sha256": "0" * 64}, "expects 0000000000"),
        ({"requirement": "tiny-data==2.0"}, "has the versions 1.0"),
        ({"requirement": "tiny-dada==1.0"}, "has no wheel of this package"),
        ({"distribution": "sdist"}, "has no sdist of this package"),
        ({"member": ["tiny_data/tabel.csv"]}, "Close to it are: 'tiny_data/table.csv'"),
    ],
)
def test_what_is_not_there_ends_in_one_message_and_leaves_nothing(
    wheels: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    wheel = make_wheel(wheels)
    with pytest.raises(UserError, match=expected) as caught, fetch_package_member(source(wheel, **changes)):
        pass
    if "sha256" in changes:
        assert sha256(wheel) in str(caught.value)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_under_pip_is_named_with_the_remedy(tmp_path: Path) -> None:
    complaint = "Traceback (most recent call last):\n  open()\nOSError: [Errno 28] No space left on device\n"
    assert "is full. Free some space, or set TMPDIR" in _explain(complaint, source(make_wheel(tmp_path)))


def test_an_index_that_cannot_be_reached_is_named_as_the_reason_within_seconds(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source(make_wheel(wheels))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    # Port 9 (discard) of this machine answers nobody.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match=r"no package index could be reached .*Connection refused"):
        fetch_package_member(wanted).__enter__()


@pytest.mark.parametrize(
    ("name", "content", "member"),
    [
        ("a.zip", zip_bytes({"f": TABLE}), ["f"]),
        ("a.tar", tar_bytes({"./f": TABLE}, "w"), ["f"]),
        ("a.tar.bz2", tar_bytes({"f": TABLE}, "w:bz2"), ["f"]),
        ("a.tar.xz", tar_bytes({"f": TABLE}, "w:xz"), ["f"]),
        ("f.gz", gzip.compress(TABLE), ["f"]),
        (
            "a.tar",
            tar_bytes({"b.zip": zip_bytes({"c.tar.gz": tar_bytes({"f": TABLE})})}, "w"),
            ["b.zip", "c.tar.gz", "f"],
        ),
    ],
)
def test_archives_of_every_kind_are_unpacked_to_any_depth(
    tmp_path: Path, name: str, content: bytes, member: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert unpack_member(tmp_path / name, member, tmp_path).read_bytes() == TABLE


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (["tiny_data/data.tar.gz", "table.tsv"], r"data\.tar\.gz: .* Close to it are: 'inside/table.tsv'"),
        (["tiny_data/table.csv", "row"], r"table\.csv: is no archive"),
    ],
)
def test_a_member_missing_at_any_depth_is_explained(tmp_path: Path, member: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        unpack_member(make_wheel(tmp_path), member, tmp_path)


def test_a_path_inside_an_archive_never_becomes_a_path_on_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(tar_bytes({"../../escaped": TABLE}, "w"))
    path = unpack_member(folder / "a.tar", ["../../escaped"], folder)
    assert folder in path.parents
    assert not (tmp_path / "escaped").exists()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(5_000))
    (tmp_path / "f.gz").write_bytes(whole[:2_000])
    with pytest.raises(UserError, match=r"f\.gz: this archive is damaged"):
        unpack_member(tmp_path / "f.gz", ["f"], tmp_path)
