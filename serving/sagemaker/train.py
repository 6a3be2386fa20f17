"""The pipeline as a SageMaker training job: `python -m serving.sagemaker train`.

Reads channels and hyperparameters, runs `dvc repro` in a copy of the project, and leaves model and results where
SageMaker collects them. An interrupted job goes on from its last checkpoint when it is started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from serving.common.adapter import NEEDED_FILES
from serving.sagemaker.folders import ROOT, Folders, channels, folders
from serving.sagemaker.metrics import METRICS
from serving.sagemaker.parameters import read_hyperparameters, write_params
from stages.common.base import TOKENIZER_FOLDER
from stages.common.errors import UserError
from stages.common.tables import read_json, write_text

# What the pipeline is made of; no results, so that the job makes its own.
PROJECT = ("stages", "preflight", "serving", "recipes", "dvc.yaml", "requirements.txt", ".dvcignore")
DVC_FOLDER = (".dvc/config", ".dvc/plots")
# Under their last names.
RESULTS = ("metrics", "data/reports", "params.yaml", "dvc.lock")
# SageMaker keeps the first 1,024 characters of the failure file.
MOST_FAILURE_CHARACTERS = 1024
# It kills a container 120 seconds after SIGTERM. Training takes its step to the end and writes a checkpoint.
SECONDS_TO_STOP = 90
# A spot instance can be taken away at any time, and a checkpoint of an adapter is small.
MINUTES_BETWEEN_CHECKPOINTS = "2"
# What a checkpoint and a finished adapter need; the latter also the tokenizer's files, which differ by base.
# Files go to S3 one by one, so some may be missing when they come back.
WHOLE = {
    "checkpoint-*": ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "adapter": (*NEEDED_FILES, "provenance.json", "README.md", "training_log/summary.json"),
}


class Stopped(BaseException):
    """SIGTERM came: the job is stopped, or its spot instance is taken away."""


def lay_out(places: Folders) -> None:
    """Copy the project and what the channels hold to `places.work`, with the job's params.yaml.

    Raises:
        UserError: channels or hyperparameters cannot be used.
    """
    inputs = channels(places.inputs)
    shutil.rmtree(places.work, ignore_errors=True)
    places.work.mkdir(parents=True)
    write_params(places.work / "params.yaml", ROOT, inputs, read_hyperparameters(places.hyperparameters))
    for name in (*PROJECT, *DVC_FOLDER):
        origin, target = ROOT / name, places.work / name
        target.parent.mkdir(exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(origin, target)
    # There is no Git repository, and no git, in a container.
    write_text(places.work / ".dvc/config.local", "[core]\n    no_scm = true\n")
    raw = places.work / "data/raw"
    if "data" in inputs:
        shutil.copytree(inputs["data"], raw)
    else:
        raw.mkdir(parents=True)


def drop_cut_checkpoints(folder: Path, tokenizer: Path) -> None:
    """Remove checkpoints and adapters that did not reach S3 as a whole before the job was interrupted.

    Args:
        folder: holds the runs.
        tokenizer: the base's, whose files every adapter has.
    """
    of_tokenizer = [path.name for path in sorted(tokenizer.iterdir())]
    for pattern, names in WHOLE.items():
        needed = dict.fromkeys([*names, *(of_tokenizer if pattern == "adapter" else [])])
        for path in folder.glob(f"*/{pattern}"):
            missing = [name for name in needed if not (path / name).is_file()]
            if missing:
                print(f"train: {path.relative_to(folder)} lacks {', '.join(missing)} and is not used", flush=True)
                shutil.rmtree(path)


def environment(places: Folders) -> dict[str, str]:
    """What the stages' processes are to see."""
    own = {
        "CHECKPOINT_DIR": str(places.checkpoints),
        "CHECKPOINT_EVERY_MINUTES": MINUTES_BETWEEN_CHECKPOINTS,
        # Training uses one GPU, and refuses to choose among several.
        "CUDA_VISIBLE_DEVICES": "0",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": "20",
    }
    always = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    wheels = channels(places.inputs).get("wheels")
    if wheels is not None:
        always |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    return own | os.environ | always


def run(command: tuple[str, ...], places: Folders) -> None:
    """Run `python -m COMMAND` in the copy, its output into this process's log.

    Raises:
        UserError: it failed; has its message.
    """
    last: deque[str] = deque(maxlen=100)
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=places.work, env=environment(places), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last.append(line)
        except (Stopped, KeyboardInterrupt):
            _stop(process)
            raise
    if process.returncode:
        raise UserError(failure_of(list(last)))


def _stop(process: subprocess.Popen[str]) -> None:
    """End a command and all that it started, as Ctrl-C would: training writes a checkpoint first, and says so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(process.pid, signal.SIGINT)
    try:
        print(process.communicate(timeout=SECONDS_TO_STOP)[0], end="", flush=True)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def failure_of(lines: list[str]) -> str:
    """The stage's message among the last lines of a failed command; where there is none, the lines themselves."""
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    message = lines[starts[-1] :] if starts else lines[-20:]
    # After the stage's own message DVC says that the stage failed.
    own = [line for line in message if not line.startswith("ERROR: failed to reproduce")]
    return "".join(own).removeprefix("error: ").strip()


def deliver(places: Folders) -> None:
    """Put what inference needs, and what people read, where SageMaker collects it."""
    models = places.work / "models"
    for folder in (places.model, places.results):
        folder.mkdir(parents=True, exist_ok=True)
    # The base too: an endpoint then needs no network, and starts as fast as its files are copied.
    shutil.copytree(models / "adapter", places.model / "adapter", dirs_exist_ok=True)
    shutil.copytree(models / "base", places.model / "base", dirs_exist_ok=True, copy_function=hand_over)
    for path in (models / "base.json", models / "decision.json", places.work / "params.yaml"):
        shutil.copyfile(path, places.model / path.name)
    for name in RESULTS:
        origin, target = places.work / name, places.results / Path(name).name
        if origin.is_dir():
            shutil.copytree(origin, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(origin, target)


def hand_over(origin: str, target: str) -> None:
    """Move a file, so that gigabytes of weights do not lie there twice; what a link leads to is not the job's own."""
    if Path(origin).is_symlink():
        shutil.copyfile(origin, target)
    else:
        shutil.move(origin, target)


def print_metrics(work: Path) -> None:
    """Print the adapter's numbers on the test split, for the metric definitions."""
    found = read_json(work / "metrics/metrics.json")["adapter"]
    for name in (metric.removeprefix("test:") for metric in METRICS if metric.startswith("test:")):
        if name in found:
            print(f"train: test {name}={found[name]:.6f}", flush=True)


@contextmanager
def failure_told(path: Path) -> Iterator[None]:
    """Write why the job failed to the file that the console shows."""
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_text(path, text[:MOST_FAILURE_CHARACTERS])
        raise


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


def main() -> None:
    """Lay out the project, run the pipeline, deliver what it made."""
    places = folders()
    signal.signal(signal.SIGTERM, _on_sigterm)
    # A shell's background jobs ignore it, and would hand that on to the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with failure_told(places.failure):
            lay_out(places)
            run(("preflight.check", "params"), places)
            # The base comes first: it decides what an adapter in the checkpoints has to have.
            run(("dvc", "repro", "base_model"), places)
            drop_cut_checkpoints(places.checkpoints, places.work / TOKENIZER_FOLDER)
            run(("dvc", "repro"), places)
            deliver(places)
            print_metrics(places.work)
    except Stopped:
        print(f"train: stopped by SIGTERM; checkpoints are in {places.checkpoints}", flush=True)
        sys.exit(128 + signal.SIGTERM)
