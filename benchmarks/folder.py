"""Time and memory of `serving.predict --folder` beside `--file`, with a tiny model: `python -m benchmarks.folder`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.stages import in_own_process, measure
from stages.common.tables import ROWS_PER_GROUP
from tests.workplace import Workplace, make_workplace, reviews

COMMAND = [sys.executable, "-m", "serving.predict"]
STAGES = ("base_model", "ingest", "format_prompts", "split", "finetune")


def main() -> None:
    """Print a Markdown table: input, rows, seconds by the clock and of processor time, peak resident memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[20_000, 200_000], help="default: 20000 200000")
    rows_of_each = parser.parse_args().rows
    print("| input | rows | seconds | CPU seconds | peak RSS, MiB |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        place = Workplace(Path(name) / "project")
        in_own_process(prepare_project, place.folder)
        for rows in rows_of_each:
            in_own_process(write_input, place.folder, rows)
            for form in ("parquet", "jsonl"):
                into = f"answers-{form}-{rows}"
                ways = {
                    f"--file, {form}": ["--file", f"{form}-{rows}/reviews.{form}", "--output", f"{into}.jsonl"],
                    f"--folder, {form}": ["--folder", f"{form}-{rows}", "--output-folder", into],
                }
                for way, arguments in ways.items():
                    cost = measure([*COMMAND, *arguments, "--column", "review"], place.folder, place.environment())
                    print(
                        f"| {way} | {rows:,} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} | {cost.peak_mib:,.0f} |",
                        flush=True,
                    )


def prepare_project(folder: Path) -> None:
    """Make a project with an adapter for a tiny base model."""
    place = make_workplace(folder)
    for stage in STAGES:
        if place.main(f"stages.{stage}"):
            sys.exit(f"{stage} failed")


def write_input(folder: Path, rows: int) -> None:
    """Write the same reviews as JSON Lines, and as Parquet in one row group, which is the worst for memory."""
    for form in ("parquet", "jsonl"):
        (folder / f"{form}-{rows}").mkdir()
    table = pa.table({"review": list(texts(rows))})
    pq.write_table(table, folder / f"parquet-{rows}/reviews.parquet", row_group_size=rows)
    with (folder / f"jsonl-{rows}/reviews.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"review": "{text}"}}\n' for text in texts(rows))


def texts(rows: int) -> Iterator[str]:
    """Reviews of some ten words."""
    lines = reviews(ROWS_PER_GROUP).splitlines()[1:]
    for row in range(rows):
        yield f"{lines[row % len(lines)].split(',')[1]} {row}"


if __name__ == "__main__":
    main()
