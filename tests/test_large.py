"""Large tables: what is read, and how much of it is in memory at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.stages import measure_stages
from stages.common.schema.ingest import TableFormat
from stages.common.sources.readers import read_rows
from stages.common.tables import ROWS_PER_GROUP, iter_batches, open_table, rows_at
from tests.printed import printed_rows

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])
# Of random digits, which hardly compress.
CHARACTERS = 200


def write_table(path: Path, sizes: list[int]) -> None:
    """A table with a row group of each size; the id of a row is its number."""
    generator = np.random.default_rng(0)
    start = 0
    with open_table(path, SCHEMA) as table:
        for size in sizes:
            digits = generator.integers(48, 123, size * CHARACTERS, np.uint8).tobytes().decode()
            texts = [digits[at : at + CHARACTERS] for at in range(0, len(digits), CHARACTERS)]
            ids = [str(number) for number in range(start, start + size)]
            table.add_batch(pa.RecordBatch.from_arrays([pa.array(ids), pa.array(texts)], schema=SCHEMA))
            start += size


def most_allocated(path: Path) -> int:
    """Bytes that Arrow holds at most while a table is read."""
    before = pa.total_allocated_bytes()
    return max(pa.total_allocated_bytes() - before for _ in iter_batches(path))


def test_no_more_of_a_table_is_in_memory_when_it_is_longer(tmp_path: Path) -> None:
    write_table(tmp_path / "short", [ROWS_PER_GROUP] * 5)
    write_table(tmp_path / "long", [ROWS_PER_GROUP] * 30)
    short, long = (most_allocated(tmp_path / name) for name in ("short", "long"))
    assert long < 1.2 * short
    assert long < 5 * ROWS_PER_GROUP * CHARACTERS


def test_a_users_parquet_file_is_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    write_table(tmp_path / "long.parquet", [ROWS_PER_GROUP] * 10)
    form = TableFormat.model_validate({"type": "parquet", "column_names": None, "quoting": None, "encoding": None})
    # Arrow reads through a Python file here, so that what it keeps are Python's bytes.
    tracemalloc.start()
    rows = read_rows(tmp_path / "long.parquet", "long.parquet", form, ["id", "text"], lambda _: None)
    assert sum(1 for _ in rows) == 10 * ROWS_PER_GROUP
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 * ROWS_PER_GROUP * CHARACTERS


@pytest.mark.parametrize("sizes", [[], [1], [3, 0, 4_000, 6_001, 9_999, 25_000, 1], [1_000] * 25])
def test_batches_are_all_rows_in_their_order_whatever_the_row_groups(tmp_path: Path, sizes: list[int]) -> None:
    write_table(tmp_path / "table", sizes)
    batches = list(iter_batches(tmp_path / "table", ["id"]))
    assert [int(cell) for batch in batches for cell in batch["id"].to_pylist()] == list(range(sum(sizes)))
    assert all(0 < batch.num_rows <= ROWS_PER_GROUP for batch in batches)
    if sizes == [1_000] * 25:
        assert [batch.num_rows for batch in batches] == [10_000, 10_000, 5_000], "small row groups are joined"
    assert pq.ParquetFile(tmp_path / "table").metadata.num_rows == sum(sizes)


def test_rows_are_found_by_their_position(tmp_path: Path) -> None:
    write_table(tmp_path / "table", [ROWS_PER_GROUP, 5, ROWS_PER_GROUP])
    wanted = [ROWS_PER_GROUP + 5, 0, ROWS_PER_GROUP + 4, 0]
    assert rows_at(tmp_path / "table", wanted, ["id"]) == {row: {"id": str(row)} for row in sorted(set(wanted))}
    assert rows_at(tmp_path / "table", [], ["id"]) == {}


@pytest.mark.slow
def test_a_row_costs_the_stages_up_to_split_less_memory_than_its_text(tmp_path: Path) -> None:
    few, many = 100_000, 400_000
    peaks = {}
    for rows in (few, many):
        folder = tmp_path / str(rows)
        folder.mkdir()
        peaks[rows] = {stage: cost.peak_mib for stage, cost in measure_stages(folder, rows, 3, "split")}
    for stage in ("ingest", "format_prompts", "split"):
        bytes_a_row = (peaks[many][stage] - peaks[few][stage]) * 2**20 / (many - few)
        print(f"{stage}: {bytes_a_row:,.0f} bytes a row")
        # With whole files in memory it was 330 in ingest and split.
        assert bytes_a_row < 250, stage


def test_the_benchmark_of_the_start_prints_three_starts() -> None:
    lines = printed_rows("benchmarks.startup", "--rows", "300")
    assert [line[:2] for line in lines] == [["300", start] for start in ("first", "resumed", "other parameters")]
    assert all(float(line[3]) <= float(line[4]) <= float(line[5]) < 60 for line in lines)
