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
from stages.common.processes import process_index
from stages.common.training.answer_loss import AnswerLossTrainer
whole = AnswerLossTrainer.compute_loss
def limited(self, model, inputs, *more, **named):
    if process_index() == 1 and len(inputs['boundaries']) - 2 > int(os.environ['MOST_ROWS']):
        raise torch.OutOfMemoryError
    return whole(self, model, inputs, *more, **named)
AnswerLossTrainer.compute_loss = limited
run_stage(finetune.main)
"""

# Run as a stage: GPUs of so many bytes.
SMALL_GPU = """
import importlib, os, torch
from stages.common.errors import run_stage
total = torch.cuda.get_device_properties(0).total_memory
for gpu in range(torch.cuda.device_count()):
    torch.cuda.set_per_process_memory_fraction(float(os.environ['GPU_BYTES']) / total, gpu)
run_stage(importlib.import_module(os.environ['STAGE']).main)
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


def start_two(place: Workplace, module: str = "stages.finetune", **more: str) -> subprocess.Popen[str]:
    """A stage in two processes, as it starts itself, but for what it imports before that: seconds of a test's time."""
    (place.folder / "two.py").write_text(
        "from stages.common.errors import run_stage\n"
        "from stages.common.launching import run_processes\n"
        f"run_stage(lambda: run_processes(2, {module!r}))\n"
    )
    return start(place, "two", **({"PYTHONPATH": f"{ROOT}{os.pathsep}{place.folder}"} | more))


def start_limited(place: Workplace, most_rows: int, **more: str) -> subprocess.Popen[str]:
    """The stage `finetune`, where process 2 has no memory for more than so many rows at a time."""
    (place.folder / "limited.py").write_text(OUT_OF_MEMORY)
    return start_two(place, "limited", **more, MOST_ROWS=str(most_rows))


def start_on_small_gpus(place: Workplace, gpu_bytes: float, stage: str, **more: str) -> subprocess.Popen[str]:
    """A stage with GPUs of so many bytes: `finetune` in two processes, another one as it starts itself."""
    (place.folder / "small.py").write_text(SMALL_GPU)
    environment = {"STAGE": f"stages.{stage}", "GPU_BYTES": str(gpu_bytes)} | more
    if stage == "finetune":
        return start_two(place, "small", **environment)
    return start(place, "small", PYTHONPATH=f"{ROOT}{os.pathsep}{place.folder}", **environment)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it says until it ends."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def wait_for_checkpoint(place: Workplace, process: subprocess.Popen[str]) -> None:
    """Until there are two: the first one is then written to its very end."""
    while sum(_complete(path) for path in (place.folder / "checkpoints").glob("*/checkpoint-*")) < 2:
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
    return [*logged(place, "train", "loss"), *logged(place, "eval", "loss")]


def logged(place: Workplace, part: str, name: str) -> list[float]:
    """A number of every step at which the training log has it."""
    path = place.folder / ADAPTER / f"training_log/plots/metrics/{part}/{name}.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file, delimiter="\t")]
