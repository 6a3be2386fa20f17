"""Time and memory of the data stages on a large synthetic CSV: `python -m benchmarks.data --rows 1000000`."""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from stages.common.progress import progress
from tests.tiny import CORPUS, save_tokenizer

PROJECT = Path(__file__).resolve().parents[1]
STAGES = ("ingest", "format_prompts", "split")
LABELS = ("negative", "neutral", "positive")
SEED = 0


def main() -> None:
    """Print a Markdown table: stage, rows, seconds, rows per second, peak resident memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the CSV (default: 1,000,000)")
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        prepare_project(folder, rows)
        print("| stage | rows | seconds | rows/s | peak RSS, MiB |\n|---|---|---|---|---|", flush=True)
        for stage in STAGES:
            seconds, peak_mib = measure(stage, folder)
            print(f"| {stage} | {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {peak_mib:,.0f} |", flush=True)


def prepare_project(folder: Path, rows: int) -> None:
    """Make a copy of the project's code with a synthetic table and a small tokenizer."""
    shutil.copytree(PROJECT / "stages", folder / "stages")
    save_tokenizer(folder / "models" / "tokenizer")
    write_table(folder / "data" / "raw" / "rows.csv", rows)
    yaml = YAML()
    params = yaml.load((PROJECT / "recipes" / "tweet-sentiment.yaml").read_text(encoding="utf-8"))
    params["ingest"]["source"] = {"kind": "files", "paths": ["data/raw/rows.csv"], "format": None}
    params["ingest"]["columns"]["label"] = "label"
    yaml.dump(params, folder / "params.yaml")


def write_table(path: Path, rows: int) -> None:
    """Write a CSV with id, text (80 to 200 characters of words that the tokenizer knows) and label."""
    generator = random.Random(SEED)
    words = sorted({word for line in CORPUS for word in line.split()})
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file, progress(rows, "writing the table") as bar:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label"])
        for number in range(rows):
            # 60 words of 4.5 characters on average make more than 200.
            text = " ".join(generator.choices(words, k=60))[: generator.randint(80, 200)]
            writer.writerow([number, text, generator.choice(LABELS)])
            bar.update()


def measure(stage: str, folder: Path) -> tuple[float, float]:
    """Run a stage in `folder`.

    Returns:
        Seconds of wall-clock time, and the highest resident memory of its process in MiB (Linux: ru_maxrss is in KiB).
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", f"stages.{stage}"], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    # wait4 has collected the child, so Popen must not look for it again.
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{stage} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
