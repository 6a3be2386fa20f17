"""Time and memory of the cheap stages on tables of several sizes: `python -m benchmarks.stages --rows 1000 10000`."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.common.predictions import write_predictions
from stages.common.tables import read_table, write_text
from tests.evaluated import write_training_log
from tests.tiny import CORPUS
from tests.workplace import REVIEWS, Workplace, make_workplace

PROJECT = Path(__file__).resolve().parents[1]
# In the order in which they run; between baseline and evaluate the answers of both models are made up.
STAGES = ("code", "base_model", "ingest", "format_prompts", "split", "baseline", "evaluate", "report")
SEED = 0
WORDS_PER_TEXT = 25
# Words that the tiny tokenizer knows; one, two or three of them make a word of the texts, 18,278 in all.
SYLLABLES = sorted(
    {word for line in CORPUS for word in line.split() if word.isalpha()}, key=lambda word: (len(word), word)
)
# A word is one of the label's own with this probability, so that there is something to learn.
OWN_SHARE = 0.1
OWN_WORDS = 100
# How far the made-up answers lean towards the truth.
STRENGTHS = {"adapter": 2.0, "base": 0.5}
CARD = "---\nlibrary_name: peft\n---\n\n# Made-up answers\n"


class Cost(NamedTuple):
    """What a process took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of processor time, which other work on the machine leaves as it is.
        peak_mib: highest resident memory (Linux: ru_maxrss is in KiB).
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    """Print a Markdown table: stage, rows, both times, peak memory, and the power with which the CPU time grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes of the table")
    parser.add_argument("--labels", type=int, default=3, help="how many labels (default: 3)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], metavar="STAGE", help="the last one to run")
    options = parser.parse_args()
    print("| stage | rows | seconds | CPU seconds | peak RSS, MiB | growth |\n|---|---|---|---|---|---|", flush=True)
    before: dict[str, tuple[int, float]] = {}
    for rows in sorted(options.rows):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            for stage, cost in measure_stages(Path(name), rows, options.labels, options.until):
                growth = f"{exponent(*before[stage], rows, cost.cpu_seconds):.2f}" if stage in before else ""
                before[stage] = rows, cost.cpu_seconds
                numbers = f"{cost.seconds:.2f} | {cost.cpu_seconds:.2f} | {cost.peak_mib:,.0f}"
                print(f"| {stage} | {rows:,} | {numbers} | {growth} |", flush=True)


def exponent(rows: int, seconds: float, more_rows: int, more_seconds: float) -> float:
    """The power of the number of rows with which a time grows: 1 is linear, and start-up makes it less."""
    return math.log(more_seconds / seconds) / math.log(more_rows / rows)


def measure_stages(folder: Path, rows: int, labels: int, last: str = STAGES[-1]) -> Iterator[tuple[str, Cost]]:
    """Run each stage as DVC does, in a project made in `folder`, up to the stage `last`."""
    in_own_process(prepare_project, folder, rows, [f"label{number}" for number in range(labels)])
    for stage in STAGES[: STAGES.index(last) + 1]:
        if stage == "evaluate":
            in_own_process(write_model_outputs, folder)
        command = [sys.executable, "-m", f"stages.{stage}"]
        yield stage, measure(command, folder, Workplace(folder).environment())


def in_own_process(work: Callable[..., None], *arguments: Any) -> None:
    """Do something in another process: what is measured later would inherit the memory that it takes."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} ended with {process.exitcode}")


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    """Run a command in `folder`; what it prints is not shown."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    # wait4 has collected the child, so Popen must not look for it again.
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command[1:])} ended with {process.returncode}")
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def prepare_project(folder: Path, rows: int, labels: list[str]) -> None:
    """Make a project with a table of `rows` texts, a tiny base model, and the code that the stage code digests."""
    place = make_workplace(folder)
    place.set("task.labels", labels)
    place.set("format_prompts.max_length_tokens", 512)
    shutil.copytree(PROJECT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "requirements.txt", folder)
    write_texts(folder / REVIEWS, rows, labels)


def write_texts(path: Path, rows: int, labels: list[str]) -> None:
    """Write a CSV of texts of some 25 words, the same at each call; frequencies of words fall as in a language."""
    generator = np.random.default_rng(SEED)
    words = np.array(["".join(parts) for length in (1, 2, 3) for parts in itertools.product(SYLLABLES, repeat=length)])
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    codes = generator.integers(0, len(labels), rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "review", "opinion"])
        for number, code in enumerate(codes.tolist()):
            count = 3 + generator.poisson(WORDS_PER_TEXT - 3)
            chosen = np.searchsorted(share, generator.random(count) * share[-1])
            own = generator.random(count) < OWN_SHARE
            chosen[own] = len(words) - 1 - code * OWN_WORDS - generator.integers(0, OWN_WORDS, own.sum())
            writer.writerow([number, " ".join(words[chosen]), labels[code]])


def write_model_outputs(folder: Path) -> None:
    """Write what finetune, infer and infer_base would: a log, a card, and answers that lean towards the truth."""
    labels = Workplace(folder).params()["task"]["labels"]
    generator = np.random.default_rng(SEED)
    for part in ("validation", "test"):
        ids, cells = (
            column.to_pylist() for column in read_table(folder / f"data/splits/{part}.parquet", ["id", "label"])
        )
        actual = np.array(cells)[:, None] == np.array(labels)
        for name, strength in STRENGTHS.items():
            odds = np.exp(generator.normal(size=actual.shape) + strength * actual)
            answers = [labels[code] for code in odds.argmax(axis=1)]
            path = folder / f"data/predictions/{name}/{part}.parquet"
            write_predictions(path, ids, cells, answers, odds / odds.sum(axis=1, keepdims=True), labels)
    write_training_log(folder)
    write_text(folder / "models/adapter/README.md", CARD)


if __name__ == "__main__":
    main()
