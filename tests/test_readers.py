"""Readers are given files as users' programs write them, and files that are broken in known ways."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.common.errors import UserError
from stages.common.schema.ingest import TableFormat
from stages.common.sources import json_objects
from stages.common.sources.readers import Row, format_of, read_rows

CSV = b"id,text,label\n1,good,positive\n2,bad,negative\n"
ROWS = [(2, ("good", "positive")), (3, ("bad", "negative"))]


def form(kind: str, **changes: object) -> TableFormat:
    values = {
        "type": kind,
        "column_names": None,
        "quoting": True if kind in ("csv", "tsv") else None,
        "encoding": None if kind == "parquet" else "utf-8",
    }
    return TableFormat.model_validate(values | changes)


def read(path: Path, table_format: TableFormat | None = None, columns: list[str] | None = None) -> list[Row]:
    return list(read_rows(path, path.name, table_format or format_of(path.name), columns or ["text", "label"]))


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        archive.writestr("__MACOSX/._table", b"")
        archive.writestr("folder/table", content)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".zip": zipped,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_table_reads_the_same_however_it_is_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.csv{suffix}"
    path.write_bytes(COMPRESSORS[suffix](CSV))
    assert read(path) == ROWS


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_parquet_reads_the_same_however_it_is_compressed(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": [1, 2], "text": ["good", None], "label": ["positive", "negative"]}), buffer)
    path = tmp_path / f"table.parquet{suffix}"
    path.write_bytes(COMPRESSORS[suffix](buffer.getvalue()))
    assert read(path) == [(1, ("good", "positive")), (2, (None, "negative"))]


def test_tab_separated_cells_keep_their_quotes_when_there_is_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_bytes(b'1\t"so\tpositive\r\n2\tbad"\tnegative\r\n')
    names = form("tsv", column_names=["id", "text", "label"], quoting=False)
    assert read(path, names) == [(1, ('"so', "positive")), (2, ('bad"', "negative"))]


def test_rows_are_numbered_by_the_line_on_which_they_start(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b'text,label\n"two\nlines",a\n\n"x",b\r\ny,c')
    assert read(path) == [(2, ("two\nlines", "a")), (5, ("x", "b")), (6, ("y", "c"))]


def test_one_wanted_column_comes_as_a_row_of_one(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(CSV)
    assert read(tmp_path / "table.csv", columns=["text"]) == [(2, ("good",)), (3, ("bad",))]


def test_a_cell_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text,label\n" + "x" * 10_000_000 + ",a\n")
    ((_, values),) = read(tmp_path / "table.csv")
    assert len(values[0]) == 10_000_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("only-one", "has 1 cells where there are 2 columns"),
        ("a,b,c", "has 3 cells where there are 2 columns"),
        ('"a"b,c', "has text after a closing quote"),
    ],
)
def test_a_broken_row_is_refused_by_number_and_the_next_one_is_read(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "table.csv").write_text(f"text,label\na,b\n{line}\nc,d\n")
    first, (number, problem), last = read(tmp_path / "table.csv")
    assert (first, last) == ((2, ("a", "b")), (4, ("c", "d")))
    assert number == 3
    assert isinstance(problem, str)
    assert reason in problem


def test_a_quote_that_is_never_closed_is_refused_where_it_opens(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text('text,label\na,b\n"never,closed\nc,d\n')
    assert read(tmp_path / "table.csv") == [(2, ("a", "b")), (3, "opens a quote that is never closed")]


def test_json_lines_are_read_with_missing_keys_as_null_and_broken_lines_refused(tmp_path: Path) -> None:
    lines = ['{"text": "a\u2028b", "label": 1}', "", '{"text": "c"}', '{"text": ', "[1]", '{"label": "d", "text": 2.5}']
    (tmp_path / "table.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    rows = read(tmp_path / "table.jsonl")
    assert [number for number, _ in rows] == [1, 3, 4, 5, 6]
    assert [rows[i][1] for i in (0, 1, 4)] == [["a\u2028b", 1], ["c", None], [2.5, "d"]]
    assert str(rows[2][1]).startswith("is no JSON")
    assert rows[3][1] == "is a JSON list, not an object"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON_VALUES, max_size=6), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 9))
def test_a_list_in_json_is_read_piece_by_piece_as_json_reads_it_whole(
    values: list[object], indent: int | None, ascii_only: bool, piece: int
) -> None:
    text = " \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_objects, "PIECE", piece)
        rows = [row for _, row in json_objects.json_objects(io.StringIO(text), "a.json")]
    kinds = [
        value if isinstance(value, dict) else f"is a JSON {type(value).__name__}, not an object" for value in values
    ]
    assert rows == kinds


def test_the_objects_of_a_list_are_numbered_in_it_since_all_may_stand_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'\n[\n  {"text":\n "a\\n"}, {"text": "b"\n},\n\n{"text": "c"}]'))
    assert read(path, columns=["text"]) == [(1, ["a\n"]), (2, ["b"]), (3, ["c"])]


def test_a_list_of_many_objects_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "x" * (number % 3_000), "label": number} for number in range(3_000)]
    path.write_text(json.dumps(rows))
    assert path.stat().st_size > 4 * json_objects.PIECE
    assert [values for _, values in read(path)] == [[row["text"], row["label"]] for row in rows]


def test_lines_are_json_lines_even_when_the_name_says_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "x" * 3_000_000, "label": 1}) + '\n[1]\n{"text": "b"}\n')
    first, second, third = read(path)
    assert (first[0], len(first[1][0]), first[1][1]) == (1, 3_000_000, 1)
    assert (second, third) == ((2, "is a JSON list, not an object"), (3, ["b", None]))


def test_lists_of_objects_come_as_such_from_json_lines_and_parquet_and_as_text_from_csv(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'so "far"\n'}, {"role": "assistant", "content": "good"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"turns": turns}) + "\n", encoding="utf-8")
    pq.write_table(pa.table({"turns": [turns]}), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["turns"], [json.dumps(turns)]])
    ((_, from_json),) = read(tmp_path / "a.jsonl", columns=["turns"])
    ((_, from_parquet),) = read(tmp_path / "a.parquet", columns=["turns"])
    ((_, from_csv),) = read(tmp_path / "a.csv", columns=["turns"])
    assert from_json == [turns]
    assert from_parquet == (turns,)
    assert from_csv == (json.dumps(turns),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_a_file_is_read_in_the_encoding_that_params_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\ncafé,positive\n", encoding=encoding)
    assert read(path, form("csv", encoding=encoding)) == [(2, ("café", "positive"))]


def test_a_byte_order_mark_is_no_part_of_the_first_column_name(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text,label\na,b\n", encoding="utf-8-sig")
    assert read(tmp_path / "table.csv") == [(2, ("a", "b"))]


LATIN = "text,label\n" + "plain,a\n" * 5_000 + "café,b\n"
CASES = [
    ("a.csv", b"", "a.csv: is empty"),
    ("a.csv", b"\n\n", "nothing but empty lines"),
    ("a.jsonl", b"\n", "nothing but empty lines"),
    ("a.csv", b"id,txt,label\n1,a,b\n", "no column 'text'. It has 'id', 'txt', 'label'. Did you mean 'txt'"),
    ("a.jsonl", b'{"txt": 1, "label": 2}', "no column 'text'. It has 'txt', 'label'. Did you mean 'txt'"),
    ("a.csv", b"text,text,label\n", "has the column 'text' more than once"),
    ("a.csv", LATIN.encode("cp1252"), "line 5,002 is not utf-8 text"),
    ("a.csv.gz", gzip.compress(LATIN.encode("cp1252")), "line 5,002 is not utf-8 text"),
    ("a.csv.zst", zstd(LATIN.encode("cp1252")), "line 5,002 is not utf-8 text"),
    ("a.csv", CSV.decode().encode("utf-16"), "start byte). Set its source's format.encoding to utf-16"),
    ("a.csv", CSV.decode().encode("utf-16-le"), "first row holds NUL bytes"),
    ("a.jsonl", b'{"text": "caf\xe9"}', "line 1 is not utf-8 text"),
    ("a.json", b"[]", "nothing but empty lines or an empty list"),
    ("a.json", b'[{"txt": 1, "label": 2}]', "no column 'text'. It has 'txt', 'label'. Did you mean 'txt'"),
    ("a.json", b'[{"text": 1}\n{"text": 2}]', "line 2: a comma or ] is missing"),
    ("a.json", b'[{"text": 1},\n\n{"text": }]', "line 3: Expecting value"),
    ("a.json", b'[{"text": 1},\n]', "line 2: Expecting value"),
    ("a.json", b'[{"text": 1},\n{"text": "a', "line 2: Unterminated string"),
    ("a.json", b'[{"text": 1}', "line 1: a comma or ] is missing"),
    ("a.json", b'[{"text": 1}]\n[]', "line 2: there is more behind its end"),
    ("a.json", b"[" * 100_000, "line 1: maximum recursion depth"),
    ("a.json", b'[{"text": ' + b"1" * 5_000 + b"}]", "line 1: Exceeds the limit"),
    ("a.json.gz", gzip.compress(b'[{"text": 1}]')[:-12], "is damaged or incomplete after row"),
    ("a.csv.gz", gzip.compress(CSV * 9)[:-12], "is damaged or incomplete after row"),
    ("a.csv.bz2", bz2.compress(CSV * 9)[:-12], "is damaged or incomplete after row"),
    ("a.csv.xz", lzma.compress(CSV * 9)[:-12], "is damaged or incomplete after row"),
    ("a.csv.zst", zstd(CSV * 9)[:-6], "is damaged or incomplete after row"),
    ("a.parquet", b"no parquet at all", "is no Parquet file"),
    ("a.parquet", b"PAR1" + b"x" * 40 + b"PAR1", "is no Parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), CASES, ids=[f"{n}: {e}" for n, _, e in CASES])
def test_what_is_wrong_with_a_whole_file_ends_in_one_message(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(name)


def test_a_zip_archive_of_several_files_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("one.csv", CSV)
        archive.writestr("two.csv", CSV)
    with pytest.raises(UserError, match=r"holds 2 files \(one.csv, two.csv\)"):
        read(tmp_path / "a.csv.zip")


def test_a_damaged_parquet_page_is_reported_and_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(5_000)]
    pq.write_table(pa.table({"text": texts, "label": texts}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:4_000] = bytes(3_800)
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-9", "rot13"])
def test_an_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes(CSV)
    with pytest.raises(UserError, match=f"{encoding}.*is unknown"):
        read(tmp_path / "a.csv", form("csv", encoding=encoding))


def test_a_name_that_does_not_say_its_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.xlsx: its name does not say"):
        format_of("data.xlsx")


def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(CSV * 1_000))
    seen: list[int] = []
    list(read_rows(path, path.name, format_of(path.name), ["text"], seen.append))
    assert sum(seen) == path.stat().st_size
