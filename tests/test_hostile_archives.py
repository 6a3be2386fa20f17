"""Archives and compressed tables that are made to do harm: no path leaves its folder, nothing fills disk or memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import resource
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.common.errors import UserError
from stages.common.sources import streams
from stages.common.sources.packages import unpack_member
from stages.common.sources.readers import format_of, read_rows
from tests.hostile import anything, examples
from tests.test_packages import tar_bytes, zip_bytes
from tests.workplace import ROOT

ROWS = "text,label\nnice,good\n" + "".join(f"day {number},bad\n" for number in range(200))
COLUMNS = ["text", "label"]
MEBIBYTE = 1 << 20


def parquet_bytes(**options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["nice", "é", None] * 50, "label": ["a", "b", "c"] * 50}), file, **options)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return compressed


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


# --- paths ------------------------------------------------------------------------------------------------------------

PARTS = ["..", ".", "", "/", "a", "b.csv", "C:", "\\", "..\\", "~", "con", "é", " ", "x" * 60]
paths = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join) | anything().map(
    lambda name: name.replace("\0", "")
)


@examples(80)
@given(names=st.lists(paths.filter(bool), min_size=1, max_size=3, unique=True), kind=st.sampled_from(["zip", "tar"]))
def test_a_member_is_written_into_its_folder_alone_whatever_its_path(
    names: list[str], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("outside")
    folder = root / "deep" / "down"
    folder.mkdir(parents=True)
    (root / "deep/victim").write_bytes(b"before")
    try:
        content = (zip_bytes if kind == "zip" else tar_bytes)(dict.fromkeys(names, b"content"))
    except (UnicodeError, ValueError):
        return
    (folder / "a").write_bytes(content)
    try:
        found = unpack_member(folder / "a", [names[0]], folder)
    except UserError:
        pass
    else:
        assert found.read_bytes() == b"content" and folder.resolve() in found.resolve().parents
    outside = {path for path in files_below(root) if folder not in path.parents}
    assert outside == {root / "deep/victim"} and (root / "deep/victim").read_bytes() == b"before"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../victim", "other"])
def test_links_and_devices_in_an_archive_are_no_files(kind: bytes, target: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("secret")
    (tmp_path / "deep/down").mkdir(parents=True)
    archive = tmp_path / "deep/down/a.tar"
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("wanted")
        link.type, link.linkname = kind, target
        tar.addfile(link)
        other = tarfile.TarInfo("other")
        other.size = 7
        tar.addfile(other, io.BytesIO(b"content"))
    with pytest.raises(UserError, match="holds no file 'wanted'"):
        unpack_member(archive, ["wanted"], tmp_path / "deep/down")


def test_a_link_in_a_zip_archive_is_its_text(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("wanted")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    found = unpack_member(tmp_path / "a.zip", ["wanted"], tmp_path)
    assert not found.is_symlink() and found.read_bytes() == b"/etc/passwd"


# --- bombs ------------------------------------------------------------------------------------------------------------

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".zip": lambda content: zipped({"t.csv": content}),
}


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs of megabytes do for those of gigabytes."""
    monkeypatch.setattr(streams, "ALWAYS_ALLOWED_BYTES", MEBIBYTE)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_table_is_read_up_to_so_many_times_its_size(suffix: str, small: None, tmp_path: Path) -> None:
    path = tmp_path / f"t.csv{suffix}"
    path.write_bytes(COMPRESS[suffix](b"text,label\n" + b"nice,good\n" * 800_000))
    read = 0
    with pytest.raises(UserError, match=r"t\.csv\S+: holds more than [\d,]+ bytes once it is decompressed, over 500"):
        for _ in read_rows(path, path.name, format_of(path.name), COLUMNS):
            read += 1
    assert 50_000 < read < 800_000
    # The same table with so much beside it that it is no bomb.
    path.write_bytes(COMPRESS[suffix](b"text,label\n" + b"nice,good\n" * 90_000))
    assert sum(1 for _ in read_rows(path, path.name, format_of(path.name), COLUMNS)) == 90_000


@pytest.mark.parametrize("kind", [*COMPRESS, ".tar.xz", "in each other", "sparse"])
def test_what_an_archive_gives_out_is_bounded(kind: str, small: None, tmp_path: Path) -> None:
    content = b"x" * 16 * MEBIBYTE
    path, member = tmp_path / "f.gz", ["f"]
    if kind == ".tar.xz":
        path.write_bytes(lzma.compress(tar_bytes({"before": content, "f": b"x"}, "w")))
    elif kind == "in each other":
        # Each within its bound, all together not: a thousand times a thousand.
        path, member = tmp_path / "a.zip", ["b.xz", "b"]
        path.write_bytes(zipped({"b.xz": lzma.compress(content)}))
    elif kind == "sparse":
        path.write_bytes(sparse_tar(1 << 40))
    else:
        path = tmp_path / f"t.csv{kind}"
        path.write_bytes(COMPRESS[kind](content))
        member = ["t.csv"]
    with pytest.raises(UserError, match=r"once it is decompressed, over 500|holds no file 'f'"):
        unpack_member(path, member, tmp_path)
    assert sum(file.stat().st_size for file in files_below(tmp_path)) < 9 * MEBIBYTE


def sparse_tar(size: int) -> bytes:
    """A file of a terabyte that holds nothing, as GNU tar writes it."""
    info = tarfile.TarInfo("f")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (size - 1, 0)
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"\0" * 1024


def test_a_parquet_file_that_names_one_long_text_in_every_row_is_bounded(tmp_path: Path) -> None:
    # 300 rows of a text of 4 MB: 1.2 GB out of a file of some kilobytes; of a chat's turns the same.
    long = pa.array(["x" * 4_000_000])
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), long)
    turns = pa.ListArray.from_arrays(range(301), pa.StructArray.from_arrays([same], ["content"]))
    for name, column in (("texts", same), ("turns", turns)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": column, "label": ["a"] * 300}), path, compression="zstd",
                       store_schema=False, dictionary_pagesize_limit=1 << 24)  # fmt: skip
        assert path.stat().st_size < 100_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match="holds more than 268,435,456 bytes once it is decompressed"):
            for _ in read_rows(path, path.name, format_of(path.name), COLUMNS):
                pass
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_many_equal_rows_in_a_few_bytes_are_bounded(small: None, tmp_path: Path) -> None:
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a"]))
    pq.write_table(pa.table({"text": same, "label": same}), tmp_path / "t.parquet", store_schema=False)
    with pytest.raises(UserError, match=r"holds more than [0-9,]+ bytes once it is decompressed"):
        for _ in read_rows(tmp_path / "t.parquet", "t.parquet", format_of("t.parquet"), COLUMNS):
            pass


READ = """
import resource, sys
from pathlib import Path
from stages.common.sources.readers import format_of, read_rows
from stages.common.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
path = Path(sys.argv[1])
rows = 0
try:
    for row in read_rows(path, path.name, format_of(path.name), ["text", "label"]):
        rows += 1
    # Not ru_maxrss, which begins with what the parent had.
    [most] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(rows, most)
except UserError as error:
    print(error)
"""


def read_elsewhere(path: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", READ, str(path)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_long_texts_of_parquet_that_are_within_the_bound_are_read_one_after_the_other(tmp_path: Path) -> None:
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array(["x" * 4_000_000]))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": same, "label": ["a"] * 60}), path, store_schema=False,
                   dictionary_pagesize_limit=1 << 24)  # fmt: skip
    rows, kilobytes = map(int, read_elsewhere(path).split())
    # All 240 MB at once would be twice in memory, as Arrow's and as Python's.
    assert rows == 60 and kilobytes < 400_000


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_a_line_of_gigabytes_does_not_fill_the_memory(name: str, tmp_path: Path) -> None:
    # A gibibyte and more in a line, in a file of a megabyte, read by a process that may have two.
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(b'text,label\n"' if "csv" in name else b'{"text": "')
        for _ in range(1_100):
            file.write(b"x" * MEBIBYTE)
    said = read_elsewhere(tmp_path / name)
    assert f"{name}: has a line of more than 67,108,864 characters" in said


# --- damage -----------------------------------------------------------------------------------------------------------

SOUND = {
    "t.csv": ROWS.encode(), "t.jsonl": b'{"text": "a", "label": "b"}\n{"text": ["x"], "label": null}\n' * 20,
    "l.jsonl": b'[{"text": "a", "label": "b"}, {"text": {"x": 1}}]', "t.parquet": parquet_bytes(),
    "z.parquet": parquet_bytes(compression="zstd"), "p.parquet.gz": gzip.compress(parquet_bytes()),
    **{f"t.csv{suffix}": compress(ROWS.encode()) for suffix, compress in COMPRESS.items()},
}  # fmt: skip
ARCHIVES = {
    "a.zip": zipped({"f": ROWS.encode()}), "a.tar": tar_bytes({"f": b"x"}, "w"), "a.tar.gz": tar_bytes({"f": b"x"}),
    "f.gz": gzip.compress(b"x" * 99), "f.xz": lzma.compress(b"x" * 99), "b.zip": zip_bytes({"f": b"x"}),
}  # fmt: skip
# Where, what instead; negative places count from the end, where zip and Parquet have their tables of contents.
edits = st.lists(
    st.tuples(st.integers(-150, 300), st.binary(min_size=0, max_size=4), st.integers(0, 4)), min_size=1, max_size=5
)


def edited(content: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    found = bytearray(content)
    for place, inserted, removed in changes:
        start = max(0, min(len(found), place if place >= 0 else len(found) + place))
        found[start : start + removed] = inserted
    return bytes(found)


@examples(400)
@given(name=st.sampled_from([*SOUND]), changes=edits)
def test_a_damaged_table_gives_rows_or_one_message(
    name: str, changes: list[tuple[int, bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(edited(SOUND[name], changes))
    try:
        rows = list(read_rows(path, name, format_of(name), COLUMNS))
    except UserError as error:
        assert name in str(error)
    else:
        assert all(isinstance(values, str) or len(values) == 2 for _, values in rows)


@examples(300)
@given(name=st.sampled_from([*ARCHIVES]), changes=edits)
def test_a_damaged_archive_gives_its_member_or_one_message(
    name: str, changes: list[tuple[int, bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(edited(ARCHIVES[name], changes))
    try:
        unpack_member(folder / name, ["f"], folder)
    except UserError as error:
        assert name in str(error)


def test_texts_of_parquet_that_are_no_text_are_refused_row_by_row(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", b"good"]).view(pa.string())
    moment = pa.array([0, 2**62, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": broken, "label": ["a", "b", "c"], "time": moment}), tmp_path / "t.parquet")
    for columns in (COLUMNS, ["time", "label"]):
        [first, second, third] = read_rows(tmp_path / "t.parquet", "t", format_of("t.parquet"), columns)
        assert [number for number, _ in (first, second, third)] == [1, 2, 3]
        assert "that is not UTF-8, or a time that no calendar has" in second[1]
        assert list(first[1])[1:] == ["a"] and list(third[1])[1:] == ["c"]
