"""What can go wrong in training, for real: signals, damaged checkpoints, full disks, broken rows, killed helpers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from safetensors.torch import load_file, save_file

from stages.common.errors import run_stage
from stages.common.params import load_params
from stages.common.training import trainer
from stages.common.training.checkpoints import HASHES, finished_adapter, last_checkpoint
from stages.common.training.rows import read_rows
from stages.common.training.step_rows import ids_of_step
from stages.common.training.stopping import NONE_CAME, signal_that_came, signals_noted, steps_begin
from stages.finetune import PARTS
from tests.stored import flipped
from tests.test_finetune import ADAPTER, STAGE, copy_of, files, has_checkpoint, lora
from tests.workplace import ROOT, Workplace, make_workplace


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A project up to its splits, to be trained for 40 steps, with dropout: the random state has to be restored too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = make_workplace(tmp_path_factory.mktemp("faults") / "project")
    place.set("base_model.path", str(place.folder / "base"))
    for name, value in {"lora": lora(dropout=0.2), "max_steps": 40, "evaluate_every_steps": 10}.items():
        place.set(f"finetune.{name}", value)
    place.run_up_to_splits()
    yield place
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(prepared: Workplace) -> Workplace:
    """Trained without interruption."""
    place = copy_of(prepared, prepared.folder.with_name("whole"))
    assert place.main(STAGE) == 0
    return place


def started(place: Workplace, log: Path) -> ForkProcess:
    """`python -m stages.finetune` in a process and group of its own, which need not import torch again.

    It ignores SIGINT from its start, as what a script starts with `&` does.
    """

    def run() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # pytest's own lead elsewhere.
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w")
        sys.exit(place.main(STAGE))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for_checkpoint(place: Workplace, step: int, process: ForkProcess) -> None:
    while not has_checkpoint(place, step):
        assert process.is_alive(), "it ended before"
        time.sleep(0.002)


def ended(process: ForkProcess) -> int | None:
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
    return process.exitcode


def run_folder(place: Workplace) -> Path:
    [folder] = (path.parent for path in (place.folder / "checkpoints").glob("*/order"))
    return folder


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_writes_a_checkpoint_first_from_which_the_next_run_goes_on_to_the_same_adapter(
    prepared: Workplace, whole: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, name: str
) -> None:
    place = copy_of(prepared, tmp_path / "project")
    process = started(place, tmp_path / "log")
    wait_for_checkpoint(place, 10, process)
    time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert ended(process) == 128 + number
    text = (tmp_path / "log").read_text()
    found = re.search(rf"\nstopped by {name}: step (\d+) has a checkpoint, from which the same command goes on\n", text)
    assert found is not None, text
    assert "Traceback" not in text, text
    assert last_checkpoint(run_folder(place)) == run_folder(place) / f"checkpoint-{found[1]}"
    assert not (place.folder / ADAPTER).exists()

    changed = copy_of(place, tmp_path / "changed", max_steps=2)
    capfd.readouterr()
    assert changed.main(STAGE) == 0
    assert "a step, from the start" in capfd.readouterr().out
    assert place.main(STAGE) == 0
    assert f"from checkpoint-{found[1]}" in capfd.readouterr().out
    assert files(place) == files(whole)


def test_a_second_ctrl_c_ends_at_once_and_sigterm_however_often_does_not(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from stages.common.errors import run_stage
from stages.common.training.stopping import signals_noted, steps_begin

def main():
    with signals_noted():
        steps_begin()
        for name in sys.argv[1:]:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.01)
        print("went on", flush=True)

run_stage(main)
"""
    for sent, code_expected, goes_on in (
        (["SIGINT", "SIGINT"], 130, False),
        (["SIGTERM", "SIGTERM"], 143, True),
        (["SIGTERM", "SIGINT"], 143, True),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *sent], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == code_expected
        assert ("went on" in result.stdout) == goes_on
        assert result.stderr.count("stopped by") == 1


def test_before_the_first_step_there_is_nothing_to_save_and_a_signal_ends_training_at_once() -> None:
    from stages.common.errors import Stopped

    with pytest.raises(Stopped), signals_noted():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="training had ended"), signals_noted():
        steps_begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal_that_came() == signal.SIGTERM
    assert signal_that_came() == NONE_CAME


# --- a parent that is gone --------------------------------------------------------------------------------------------

STAGE_OF_ITS_OWN = "import time; from stages.common.errors import run_stage\nrun_stage(lambda: time.sleep(60))"
STARTER = """
import subprocess, sys
subprocess.run(["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", sys.argv[1]], env={"DVC_STAGE": "s"})
"""


def test_a_stage_ends_when_the_process_that_ran_it_is_killed_though_a_shell_is_in_between() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, STAGE_OF_ITS_OWN], cwd=ROOT, stderr=subprocess.PIPE)
    children: list[psutil.Process] = []
    while len(children) < 2:
        children = psutil.Process(starter.pid).children(recursive=True)
        time.sleep(0.01)
    shell, stage = children
    assert shell.name() in ("sh", "dash", "bash")
    time.sleep(1.5)
    assert stage.is_running(), "it lives as long as its parents do"
    starter.kill()
    assert psutil.wait_procs([stage], timeout=10)[1] == []
    assert starter.stderr is not None
    assert starter.stderr.read().startswith(b"stopped by SIGTERM: nothing half-written stays")


def test_a_stage_whose_dvc_went_before_it_had_started_does_nothing(tmp_path: Path) -> None:
    # The process in between is gone when the stage looks.
    code = f"import time; time.sleep(0.5)\n{STAGE_OF_ITS_OWN}"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], env={{'DVC_STAGE': 's'}})"
    orphaned = subprocess.run(
        ["sh", "-c", '"$@"', "sh", sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=20,
    )  # fmt: skip
    assert orphaned.stderr == "stopped by SIGTERM: dvc has ended\n"


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(prepared: Workplace) -> Workplace:
    """Stopped when there were three checkpoints or more."""
    place = copy_of(prepared, prepared.folder.with_name("interrupted"))
    process = started(place, place.folder / "log")
    wait_for_checkpoint(place, 30, process)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process) == 143
    return place


def steps_saved(place: Workplace) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in run_folder(place).glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", HASHES]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    interrupted: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder(interrupted), folder)
    *_, before, last = steps_saved(interrupted)
    path = folder / f"checkpoint-{last}/{name}"
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(flipped(content) if how == "flipped" else content[: len(content) // 2])
    assert last_checkpoint(folder) == folder / f"checkpoint-{before}"
    assert not path.parent.exists()
    # Without hashes it was cut in mid-write, which is nothing to tell.
    told = "" if (name, how) == (HASHES, "removed") else f"checkpoint-{last} is not used, damaged: "
    assert told in (output := capfd.readouterr().out)
    assert name in output or not told or name == HASHES


def test_from_the_checkpoint_before_a_damaged_one_training_ends_in_the_same_adapter(
    interrupted: Workplace, whole: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copy_of(interrupted, tmp_path / "project")
    *_, before, last = steps_saved(place)
    weights = run_folder(place) / f"checkpoint-{last}/adapter_model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    capfd.readouterr()
    assert place.main(STAGE) == 0
    output = capfd.readouterr().out
    assert f"checkpoint-{last} is not used, damaged: adapter_model.safetensors" in output
    assert f"from checkpoint-{before}\n" in output
    assert files(place) == files(whole)


def test_a_finished_adapter_that_was_damaged_before_dvc_took_it_is_not_used(
    whole: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder(whole), folder)
    assert finished_adapter(folder) == folder / "adapter"
    weights = folder / "adapter/adapter_model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    assert finished_adapter(folder) is None
    assert "adapter is not used, damaged: adapter_model.safetensors" in capfd.readouterr().out


def test_checkpoints_on_the_disk_are_the_two_newest_and_the_best(interrupted: Workplace) -> None:
    steps = steps_saved(interrupted)
    state = json.loads((run_folder(interrupted) / f"checkpoint-{steps[-1]}/trainer_state.json").read_text())
    assert steps[-1] > 30, "after 10, 20 and 30"
    assert len(steps) == 2 + (state["best_global_step"] not in steps[-2:])
    assert state["best_global_step"] in steps


# --- a loss that is no number -----------------------------------------------------------------------------------------


def poison(place: Workplace, identifier: str) -> None:
    """One row of train gets a token whose embedding is no number."""
    folder = place.folder / "base"
    weights = load_file(folder / "model.safetensors")
    # With tied embeddings it would also be among the logits of every other row.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][399] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    configuration = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(configuration | {"tie_word_embeddings": False}))
    place.set("base_model.path", "base")
    assert place.main("stages.base_model") == 0
    path = place.folder / "data/splits/train.parquet"
    table = pq.read_table(path)
    prompts = table["prompt_ids"].to_pylist()
    assert not any(399 in prompt for prompt in prompts)
    row = table["id"].to_pylist().index(identifier)
    prompts[row][3] = 399
    column = pa.array(prompts, table.schema.field("prompt_ids").type)
    index = table.schema.get_field_index("prompt_ids")
    pq.write_table(table.set_column(index, table.schema.field(index), column), path)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint_before(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copy_of(prepared, tmp_path / "project")
    table = pq.read_table(place.folder / "data/splits/train.parquet").to_pylist()
    identifiers = {tuple(row["prompt_ids"]): row["id"] for row in table}
    drawn: list[list[str]] = []
    collate = trainer.collate_packed

    def noted(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
        if len(rows) == 16:
            # The poisoned prompt is in no table; of all others there is one.
            drawn.append([identifiers.get(tuple(row["prompt_ids"]), "poisoned") for row in rows])
        return collate(rows, pad_id)

    monkeypatch.setattr(trainer, "collate_packed", noted)
    place.set("finetune.max_steps", 11)
    assert place.main(STAGE) == 0
    assert sorted(itertools.chain(*drawn[:6])) == sorted(identifiers.values()), "an epoch"
    with place.entered():
        finetune = load_params("finetune").finetune
        rows = read_rows(PARTS, "none", 0, tmp_path / "datasets")["train"]
        assert [ids_of_step(PARTS["train"], finetune, rows, step) for step in range(1, 12)] == drawn[:11]
    poisoned = drawn[3][5]

    poison(place, poisoned)
    drawn.clear()
    capfd.readouterr()
    assert place.main(STAGE, CHECKPOINT_EVERY_MINUTES="0") == 1
    message = capfd.readouterr().err
    assert "training diverged. Lower finetune.learning_rate, or raise finetune.warmup_steps. It began with" in message
    found = re.search(r"batch of step (\d+), in data/splits/train\.parquet the ids (.*): look at", message)
    assert found is not None, message
    assert found[1] == "4"
    assert poisoned in found[2].split(", ")
    assert [name if name in drawn[3] else "poisoned" for name in found[2].split(", ")] == drawn[3]
    [folder] = (path.parent for path in (place.folder / "checkpoints").glob("*/checkpoint-3"))
    kept = last_checkpoint(folder)
    assert kept is not None and kept.name == "checkpoint-3"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "adapter_model.safetensors").values())


# --- disks ------------------------------------------------------------------------------------------------------------

DISKS = """
import os, shutil, subprocess, sys
from pathlib import Path
from stages.common.errors import run_stage
from tests.workplace import Workplace

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "checkpoints"], check=True)

place = Workplace(Path.cwd())
mount("size=4m")
mount_again = lambda options: mount("remount," + options)
mount_again("ro")
codes = [place.main("stages.finetune")]
print("mark", file=sys.stderr, flush=True)
mount_again("rw,size=SIZE")
codes.append(place.main("stages.finetune"))
print("mark", file=sys.stderr, flush=True)
try:
    run_stage(lambda: shutil.copytree("base", "checkpoints/copy"))
except SystemExit as exit:
    codes.append(exit.code)
shutil.rmtree("checkpoints/copy")
mount_again("size=20m")
codes.append(place.main("stages.finetune"))
print("codes", codes, flush=True)
"""


def test_read_only_and_full_disks_are_named_and_training_goes_on_from_the_last_checkpoint_that_had_room(
    prepared: Workplace, whole: Workplace, tmp_path: Path
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*alone, "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("unshare cannot mount a small disk here")
    place = copy_of(prepared, tmp_path / "project")
    (place.folder / "checkpoints").mkdir()
    # Room for mapped rows and two of the checkpoints.
    code = DISKS.replace("SIZE", "600k")
    result = subprocess.run(
        [*alone, sys.executable, "-c", code], cwd=place.folder, env=place.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "codes [1, 1, 1, 0]" in result.stdout, result.stdout + result.stderr
    read_only, full, copied = result.stderr.split("mark\n")
    assert re.search(r"error: CHECKPOINT_DIR=\S+ in the environment: .* Read-only file system", read_only)
    assert "the disk is full: free some space, then run the same command again" in full
    assert "the disk is full: free some space, then run the same command again" in copied
    assert "Traceback" not in result.stderr
    starts = re.findall(r"16 rows x 1 a step, from (.*)", result.stdout)
    assert starts[0] == "the start"
    assert starts[-1].startswith("checkpoint-")
    assert files(place) == files(whole)


# --- processes that prepare batches -----------------------------------------------------------------------------------


def test_a_killed_data_worker_is_one_message_and_ctrl_c_to_all_of_them_still_writes_a_checkpoint(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trainer.DATA_WORKERS, "cpu", 2)
    place = copy_of(prepared, tmp_path / "project")
    process = started(place, tmp_path / "log")
    wait_for_checkpoint(place, 10, process)
    worker = psutil.Process(process.pid).children()[0]
    worker.kill()
    assert ended(process) == 1
    text = (tmp_path / "log").read_text()
    assert re.search(r"\nerror: a process that prepares batches ended \(DataLoader worker \(pid.*checkpoint\n", text)
    assert "Traceback" not in text, text

    for number in (signal.SIGINT, signal.SIGTERM):
        (tmp_path / "log").write_text("")
        process = started(place, tmp_path / "log")
        while "'loss'" not in (tmp_path / "log").read_text():
            assert process.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.002)
        assert len(psutil.Process(process.pid).children()) >= 2
        os.killpg(process.pid or 0, number)
        assert ended(process) == 128 + number, (tmp_path / "log").read_text()
        assert re.search(r"stopped by \w+: step \d+ has a checkpoint", (tmp_path / "log").read_text())
    # Not the weights of a run without such processes: on a CPU they are seeded by what dropout draws from.
    assert place.main(STAGE) == 0


def test_a_full_disk_is_named_though_datasets_wraps_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            Path("/dev/full").write_text("rows\n")
        except OSError as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error

    with pytest.raises(SystemExit, match="1"):
        run_stage(main)
    assert "the disk is full: free some space" in capsys.readouterr().err
