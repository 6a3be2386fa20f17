"""Stages started as a user starts them, whose processes tests look at and end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.workplace import ROOT, UNWANTED, Workplace

ADAPTER = Path("models/adapter")
# Run as the stage: no memory on process 2 for more than MOST_ROWS rows at a time.
OUT_OF_MEMORY = """
import os, sys, torch
from stages import finetune
from stages.common.errors import run_stage
from stages.common.processes import joined_processes, process_index, processes_to_start, run_processes
from stages.common.training.answer_loss import AnswerLossTrainer
whole = AnswerLossTrainer.compute_loss
def limited(self, model, inputs, *more, **named):
    if process_index() == 1 and len(inputs['boundaries']) - 2 > int(os.environ['MOST_ROWS']):
        raise torch.OutOfMemoryError
    return whole(self, model, inputs, *more, **named)
AnswerLossTrainer.compute_loss = limited
def main():
    processes = processes_to_start()
    if processes is not None:
        return run_processes(processes, 'limited')
    with joined_processes():
        finetune.run()
if __name__ == '__main__':
    run_stage(main)
"""


def start(place: Workplace, *command: str, **more: str) -> subprocess.Popen[str]:
    """`python -m ...` there, on all devices that the environment shows."""
    own = {name: value for name, value in os.environ.items() if name not in (*UNWANTED, "NUM_PROCESSES")}
    environment = own | {
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT),
        "CHECKPOINT_DIR": str(place.folder / "checkpoints"),
    } | more  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=place.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_limited(place: Workplace, most_rows: int, **more: str) -> subprocess.Popen[str]:
    """The stage `finetune`, where process 2 has no memory for more than so many rows at a time."""
    (place.folder / "limited.py").write_text(OUT_OF_MEMORY)
    path = f"{ROOT}{os.pathsep}{place.folder}"
    return start(place, "limited", **more, PYTHONPATH=path, MOST_ROWS=str(most_rows))


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it says until it ends."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def wait_for_checkpoint(place: Workplace, process: subprocess.Popen[str]) -> None:
    """Until the first checkpoint is written to its end."""
    while not any(_complete(path) for path in (place.folder / "checkpoints").glob("*/checkpoint-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def _complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def ranks_of(parent: int) -> list[int]:
    """Processes that a process has started, in this order."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def losses(place: Workplace) -> list[float]:
    """Of training, then of validation, as the training log has them."""
    found = []
    for name in ("train", "eval"):
        path = place.folder / ADAPTER / f"training_log/plots/metrics/{name}/loss.tsv"
        with path.open(encoding="utf-8", newline="") as file:
            found += [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]
    return found
