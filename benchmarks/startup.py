"""Seconds from `finetune`'s start to its first step: `python -m benchmarks.startup --rows 10000 100000 1000000`.

A first start converts the split files' tokens into files that are mapped into memory. A resumed run and a run on the
same data with other parameters find them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.stages import in_own_process
from preflight.base import read_base
from stages.common.base import BASE_PIN, file_sha256
from stages.common.contents import write_contents
from stages.common.model import machine_device
from stages.common.params import load_params
from stages.common.tables import ROWS_PER_GROUP, open_table
from stages.common.training.checkpoints import checkpoint_root, fingerprint, locked_run, shared_dataset
from stages.common.training.rows import longest_row, read_rows, write_tokens
from stages.common.training.trainer import make_trainer, micro_batches
from stages.finetune import PARTS
from stages.split import CONTENTS, SPLITS
from tests.split_files import SCHEMA, prompt_format
from tests.workplace import Workplace, make_workplace

SEED = 0
# Of a prompt, on average, as those of benchmarks/stages.py have; they reach from 61 to 121.
PROMPT_TOKENS = 91
MOST_TOKENS = 128
COMPLETIONS = {"bad": [7, 2], "so-so": [8, 9, 2], "good": [8, 10, 2]}
OTHER_ROWS = 1_000  # of validation and of test, whatever train has
TOKENS = 400  # of the tests' tokenizer
STARTS = ("first", "resumed", "other parameters")
TIMED = ("preflight", "fingerprint", "rows mapped", "first step")


class Begun(Exception):  # noqa: N818
    """The first step has its batch."""


class Stop(TrainerCallback):
    """Ends a training as its first step begins."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop."""
        raise Begun


def main() -> None:
    """Print a Markdown table: seconds of each part of three starts, and the peak memory of the stage's process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="rows of train")
    parser.add_argument("--begin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.begin:
        begin()
        return
    print(f"| rows | start | {' | '.join(TIMED)} | peak RSS, MiB |\n|{'---|' * (len(TIMED) + 3)}", flush=True)
    for rows in sorted(options.rows):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            in_own_process(prepare_project, Path(name), rows)
            for start in STARTS:
                if start == "other parameters":
                    Workplace(Path(name)).set("finetune.learning_rate", 0.00123)
                before = time.perf_counter()
                run(Path(name), "preflight.check")
                found = {"preflight": time.perf_counter() - before}
                found |= json.loads(run(Path(name), "benchmarks.startup", "--begin").splitlines()[-1])
                seconds = " | ".join(f"{found[part]:.2f}" for part in TIMED)
                print(f"| {rows:,} | {start} | {seconds} | {found['peak']:,.0f} |", flush=True)


def run(folder: Path, *command: str) -> str:
    """What a module prints that runs in `folder`."""
    command = (sys.executable, "-m", *command)
    environment = Workplace(folder).environment()
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def begin() -> None:
    """Do what the stage `finetune` does until its first step, and print the seconds since its start."""
    params = load_params("finetune", "task")
    started = time.perf_counter()
    data = {name: file_sha256(path) for name, path in PARTS.items()}
    key = fingerprint([BASE_PIN], {"parameters": params.model_dump(), "data": data})
    found = {"fingerprint": time.perf_counter() - started}
    with locked_run(checkpoint_root(), key) as folder:
        tokens = shared_dataset(folder, fingerprint([], data), lambda new: write_tokens(PARTS, new))
        rows = read_rows(PARTS, params.finetune.class_balance, params.finetune.seed, folder / "balance", tokens)
        found["rows mapped"] = time.perf_counter() - started
        micro = micro_batches(params.finetune.global_batch_size, longest_row(rows.values()), machine_device().type)[0]
        trainer = make_trainer(params.finetune, micro, folder, rows)
        trainer.add_callback(Stop())
        with contextlib.suppress(Begun):
            trainer.train()
        found["first step"] = time.perf_counter() - started
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def prepare_project(folder: Path, rows: int) -> None:
    """Make a project with a tiny base model and split files of random tokens."""
    place = make_workplace(folder)
    place.set("format_prompts.max_length_tokens", MOST_TOKENS)
    place.set("format_prompts.max_shortened_share", 1)
    place.run("stages.base_model").check_returncode()
    generator = np.random.default_rng(SEED)
    for part, count in (("train", rows), ("validation", OTHER_ROWS), ("test", OTHER_ROWS)):
        write_part(folder / f"data/splits/{part}.parquet", part, count, generator, place.params())
    base = read_base(load_params("base_model", path=folder / "params.yaml").base_model, folder)
    assert base is not None
    write_contents(folder / CONTENTS, folder / SPLITS, base.begin_id)


def write_part(path: Path, part: str, rows: int, generator: np.random.Generator, params: dict[str, Any]) -> None:
    """Write a split file of so many rows, a row group in memory at a time."""
    footer = prompt_format("classification", COMPLETIONS, list(COMPLETIONS))
    footer |= {"style": "plain", "system": None, "template": params["format_prompts"]["template"]}
    footer["max_length_tokens"] = MOST_TOKENS
    with open_table(path, SCHEMA, {"prompt_format": footer}) as table:
        for start in range(0, rows, ROWS_PER_GROUP):
            table.add_batch(_rows(range(start, min(rows, start + ROWS_PER_GROUP)), part, generator))


def _rows(numbers: range, part: str, generator: np.random.Generator) -> pa.RecordBatch:
    """Rows with these numbers; as in a real split file their texts are of some 200 characters."""
    count = len(numbers)
    lengths = generator.integers(PROMPT_TOKENS - 30, PROMPT_TOKENS + 31, count)
    labels = [list(COMPLETIONS)[number % len(COMPLETIONS)] for number in numbers]
    texts = [f"{part} {number} " + "of so many words " * 12 for number in numbers]
    tokens = pa.array(generator.integers(10, TOKENS, lengths.sum()), pa.int32())
    columns: dict[str, Any] = {
        name: pa.nulls(count, field.type) for name, field in zip(SCHEMA.names, SCHEMA, strict=True)
    }
    columns |= {
        "id": [f"{part}:{number}" for number in numbers],
        "text": texts,
        "label": labels,
        "prompt": texts,
        "completion": labels,
        "prompt_ids": pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), tokens),
        "completion_ids": [COMPLETIONS[label] for label in labels],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


if __name__ == "__main__":
    main()
