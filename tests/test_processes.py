"""Stages in two processes on the CPU: the same numbers as in one, and one end for both."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from tests.launched import (
    ADAPTER,
    finish,
    logged,
    losses,
    ranks_of,
    start,
    start_limited,
    start_two,
    wait_for_checkpoint,
)
from tests.workplace import ENVIRONMENT, Workplace, make_workplace

# Sums of float32 in another order.
CLOSE = 1e-5
SHARDED = {**ENVIRONMENT, "SHARD_BASE": "1"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits; of its 96 rows, steps of 20 leave a last one of 16."""
    place = make_workplace(tmp_path_factory.mktemp("processes") / "project")
    place.set("base_model.path", str(place.folder / "base"))
    place.set("finetune.lora.r", 4)
    place.set("finetune.global_batch_size", 20)
    place.set("finetune.max_steps", 10)
    place.set("finetune.evaluate_every_steps", 4)
    place.run_up_to_splits()
    return place


def copy_of(place: Workplace, folder: Path, **finetune: Any) -> Workplace:
    shutil.copytree(place.folder, folder)
    copy = Workplace(folder)
    for name, value in finetune.items():
        copy.set(f"finetune.{name}", value)
    return copy


@pytest.fixture(scope="module")
def one(prepared: Workplace) -> Workplace:
    """Trained in one process."""
    place = copy_of(prepared, prepared.folder.with_name("one"))
    assert place.main("stages.finetune") == 0
    return place


@pytest.fixture(scope="module")
def two(prepared: Workplace) -> tuple[Workplace, str]:
    """Trained in two, and what that said."""
    place = copy_of(prepared, prepared.folder.with_name("two"))
    return place, finish(start(place, "stages.finetune", **ENVIRONMENT, NUM_PROCESSES="2"))


def files(place: Workplace) -> dict[str, bytes]:
    folder = place.folder / ADAPTER
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def difference(first: Workplace, second: Workplace) -> float:
    """Between weights of two adapters, at most."""
    one, other = (load_file(place.folder / ADAPTER / "adapter_model.safetensors") for place in (first, second))
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_two_processes_train_to_the_losses_and_weights_of_one(one: Workplace, two: tuple[Workplace, str]) -> None:
    place, said = two
    assert said.count("10 rows x 1 a step on 2 processes, from the start") == 1
    assert losses(place) == pytest.approx(losses(one), abs=CLOSE)
    # Adam's steps hardly depend on the scale of gradients, so that losses would not show a wrong one.
    norms = [logged(trained, "train", "gradient_norm") for trained in (place, one)]
    assert norms[0] == pytest.approx(norms[1], rel=CLOSE)
    # Every 5 steps and at the first one; validation at steps 4, 8 and 10.
    assert len(losses(place)) == 3 + 3
    assert difference(one, place) < CLOSE


def test_rank_0_alone_writes(one: Workplace, two: tuple[Workplace, str]) -> None:
    place, said = two
    assert files(place).keys() == files(one).keys()
    changed = {name for name, content in files(place).items() if content != files(one)[name]}
    assert changed <= {"adapter_model.safetensors", "provenance.json", "README.md"} | {
        name for name in changed if name.startswith("training_log/")
    }
    assert len(re.findall(r"^finetune: \d+ steps, best", said, flags=re.MULTILINE)) == 1
    assert not list((place.folder / "checkpoints").glob("*/checkpoint-*"))


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process_makes_the_micro_batch_smaller_on_both(
    prepared: Workplace, one: Workplace, tmp_path: Path
) -> None:
    limited = copy_of(prepared, tmp_path / "project")
    said = finish(start_limited(limited, 5, **ENVIRONMENT))
    assert re.findall(r"(\d+) rows x (\d+) a step on 2 processes, from the start", said) == [("10", "1"), ("5", "2")]
    assert losses(limited) == pytest.approx(losses(one), abs=CLOSE)
    assert difference(one, limited) < CLOSE


def test_a_base_that_two_processes_share_trains_to_the_very_adapter_of_one_that_each_holds(
    prepared: Workplace, two: tuple[Workplace, str], tmp_path: Path
) -> None:
    place = copy_of(prepared, tmp_path / "project")
    said = finish(start_two(place, **SHARDED))
    assert "on 2 processes, which share the base, activations recomputed, from the start" in said
    assert files(place) == files(two[0])


def test_one_process_predicts_with_a_base_that_is_shared(one: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    assert one.main("stages.infer", NUM_PROCESSES="2", SHARD_BASE="1") == 0
    assert "infer: one process, with the base model's layers on all GPUs" in capfd.readouterr().out
    said = finish(start_two(one, "stages.infer", **SHARDED), code=1)
    assert "error: models/base: lies on several GPUs" in said and "without a launcher" in said


def test_memory_that_runs_out_beside_a_shared_base_ends_with_what_to_set(prepared: Workplace, tmp_path: Path) -> None:
    place = copy_of(prepared, tmp_path / "project")
    said = finish(start_limited(place, 5, **SHARDED), code=1)
    assert re.search(r"error: a GPU is out of memory with 10 rows of up to \d+ tokens at a time\.", said)
    assert "Set MICRO_BATCH_SIZE=5 in the environment and run again" in said
    assert "Traceback" not in said


def test_a_shared_base_has_no_whole_weights_for_dora(prepared: Workplace, tmp_path: Path) -> None:
    place = copy_of(prepared, tmp_path / "project")
    place.set("finetune.lora.use_dora", True)
    said = finish(start_two(place, **SHARDED), code=1)
    assert "error: finetune.lora.use_dora: starts from the norms of whole weights" in said


def test_two_processes_predict_what_one_predicts(one: Workplace, tmp_path: Path) -> None:
    two = copy_of(one, tmp_path / "two")
    process = start_two(two, "stages.infer", **ENVIRONMENT)
    assert one.main("stages.infer") == 0
    finish(process)
    for part in ("validation", "test"):
        tables = [pq.read_table(place.folder / f"data/predictions/adapter/{part}.parquet") for place in (one, two)]
        assert tables[0].schema == tables[1].schema
        for name in tables[0].column_names:
            found, expected = tables[1][name], tables[0][name]
            if name.startswith("probability."):
                np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), atol=1e-6)
            else:
                assert found.equals(expected)


@pytest.fixture(scope="module")
def settled(prepared: Workplace) -> Workplace:
    """A longer training with dropout, so that each process's random state has to be restored; not yet run."""
    place = copy_of(prepared, prepared.folder.with_name("settled"), max_steps=60, evaluate_every_steps=5)
    place.set("finetune.lora.dropout", 0.2)
    return place


@pytest.fixture(scope="module")
def whole(settled: Workplace) -> Workplace:
    """That training, uninterrupted."""
    place = copy_of(settled, settled.folder.with_name("whole"))
    finish(start_two(place, **ENVIRONMENT))
    return place


def test_a_killed_process_ends_the_other_and_the_next_run_ends_in_the_very_same_adapter(
    settled: Workplace, whole: Workplace, tmp_path: Path
) -> None:
    place = copy_of(settled, tmp_path / "killed")
    process = start_two(place, **ENVIRONMENT)
    wait_for_checkpoint(place, process)
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    said = finish(process, code=1)
    assert "error: process 2 of 2 was killed by signal 9 (SIGKILL), and the others were ended." in said
    assert "Traceback" not in said
    wait_until_gone(ranks)
    assert not (place.folder / ADAPTER).exists()
    said = finish(start_two(place, **ENVIRONMENT))
    assert "on 2 processes, from checkpoint-" in said
    assert files(place) == files(whole)


def test_a_training_that_is_killed_goes_on_with_a_base_that_is_shared(
    settled: Workplace, whole: Workplace, tmp_path: Path
) -> None:
    place = copy_of(settled, tmp_path / "killed")
    process = start_two(place, **SHARDED)
    wait_for_checkpoint(place, process)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    finish(process, code=1)
    said = finish(start_two(place, **SHARDED))
    assert "which share the base, activations recomputed, from checkpoint-" in said
    assert files(place) == files(whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_launcher_that_ends_leaves_no_process_behind(
    settled: Workplace, tmp_path: Path, number: signal.Signals
) -> None:
    place = copy_of(settled, tmp_path / "project", max_steps=10_000)
    process = start_two(place, **ENVIRONMENT)
    wait_for_checkpoint(place, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number, said
        assert "has a checkpoint" in said
    wait_until_gone(ranks)
    assert not (place.folder / ADAPTER).exists()


def test_a_process_that_fails_ends_the_first_one_at_work(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "failing.py").write_text(
        "import os, time\n"
        "from stages.common.errors import UserError, run_stage\n"
        "def main():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('row 7 is at fault')\n"
        "    time.sleep(120)\n"
        "run_stage(main)\n"
    )
    said, _ = start_two(place, "failing").communicate(timeout=60)
    assert said.strip() == "error: row 7 is at fault"


def test_what_all_processes_fail_of_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "import os, time\n"
        "from stages.common.errors import UserError, run_stage\n"
        "def main():\n"
        "    time.sleep(1 if os.environ['RANK'] == '0' else 0)\n"
        "    raise UserError('row 7 is at fault')\n"
        "run_stage(main)\n"
    )
    said = finish(start_two(Workplace(tmp_path), "failing"), code=1)
    assert said.strip() == "error: row 7 is at fault"


def test_a_process_that_was_killed_is_named_though_the_first_one_had_to_be_ended(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(120)\n"
    )
    said = finish(start_two(Workplace(tmp_path), "killed"), code=1)
    assert "error: process 2 of 2 was killed by signal 9 (SIGKILL), and the others were ended." in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_processes_can_answer_it_is_no_crash(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "deaf.py").write_text(
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "pathlib.Path('started').touch()\n"
        "time.sleep(120)\n"
    )
    process = start_two(Workplace(tmp_path), "deaf")
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # the other one is as far
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"stopped by {number.name}" in said and "memory" not in said


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        # What has ended and was adopted by a process that does not ask for it is no longer alive.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ("0", "error: NUM_PROCESSES=0 in the environment must be a whole number from 1, as 2"),
        ("two", "error: NUM_PROCESSES=two in the environment must be a whole number from 1, as 2"),
        ("3", "error: 3 processes (one for each GPU) cannot share the 20 rows of a step evenly. Set NUM_PROCESSES in"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_refused_in_one_message(
    prepared: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: str, message: str
) -> None:
    place = copy_of(prepared, tmp_path / "project")
    assert place.main("stages.finetune", NUM_PROCESSES=processes) == 1
    said = capfd.readouterr().err
    assert said.count("error: ") == 1
    assert message in said


@pytest.mark.slow
def test_the_benchmark_measures_training_and_scoring_for_each_number_of_processes(prepared: Workplace) -> None:
    options = ("--shape", "tiny", "--processes", "1", "2", "--batches", "8", "--rows", "32", "--steps", "3")
    said = finish(start(prepared, "benchmarks.scaling", *options, "--warmup-steps", "1", **ENVIRONMENT))
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"benchmark"')]
    found = [(line["benchmark"], line["processes"], line["rows"]) for line in lines]
    assert found == [("training", 1, 8), ("scoring", 1, 32), ("training", 2, 8), ("scoring", 2, 32)]
    assert all(line["examples_per_second"] > 0 for line in lines)


# --- several machines -------------------------------------------------------------------------------------------------


def join(place: Workplace, address: str, port: int) -> subprocess.Popen[str]:
    """`torchrun` on one of two machines, which meet at 127.0.0.1, each with one process."""
    return start(
        place, "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1",
        "--rdzv-backend", "c10d", "--rdzv-id", "reviews", "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--local-addr", address, "--module", "stages.finetune",
        # Otherwise a new start may read the addresses that the last one left in the store.
        **ENVIRONMENT, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip


@pytest.mark.slow
def test_two_machines_train_to_the_adapter_of_two_processes_and_start_again_when_one_of_them_is_killed(
    settled: Workplace, whole: Workplace, tmp_path: Path
) -> None:
    place = copy_of(settled, tmp_path / "project")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [join(place, address, port) for address in ("127.0.0.1", "127.0.0.2")]
    wait_for_checkpoint(place, machines[0])
    (worker,) = ranks_of(machines[1].pid)
    os.kill(worker, signal.SIGKILL)
    said = "".join(finish(machine) for machine in machines)
    assert len(re.findall(r"10 rows x 1 a step on 2 processes, from the start", said)) == 1
    assert len(re.findall(r"10 rows x 1 a step on 2 processes, from checkpoint-\d+", said)) == 1
    assert files(place) == files(whole)
