"""Real training of the tiny base on the CPU: what it resumes, keeps, logs and leaves behind."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback

from stages.common.model import load_model
from stages.common.params import load_params
from stages.common.training.answer_loss import AnswerLossTrainer
from stages.common.training.checkpoints import HASHES
from stages.common.training.rows import read_rows
from stages.common.training.trainer import MicroBatch, make_trainer
from stages.finetune import PARTS
from tests.split_files import TERMINATOR, multi_label_format, prompt_format, write_split
from tests.workplace import ROOT, Workplace, make_workplace

STAGE = "stages.finetune"
ADAPTER = Path("models/adapter")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order in which threads add up is what could make two runs differ here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits."""
    place = make_workplace(tmp_path_factory.mktemp("finetune") / "project")
    place.set("base_model.path", str(place.folder / "base"))
    place.run_up_to_splits()
    return place


def copy_of(place: Workplace, folder: Path, **finetune: Any) -> Workplace:
    """The same project elsewhere, with other values in its finetune block."""
    shutil.copytree(place.folder, folder, symlinks=True)
    copy = Workplace(folder)
    for name, value in finetune.items():
        copy.set(f"finetune.{name}", value)
    return copy


def lora(**changes: Any) -> dict[str, Any]:
    plain = {"r": 4, "alpha": 8, "dropout": 0, "target_modules": "all-linear", "use_rslora": False, "use_dora": False}
    return plain | changes


@pytest.fixture(scope="module")
def plain(prepared: Workplace) -> Workplace:
    """Trained for 6 steps, all 16 rows of a step at once, with TensorBoard's log asked for."""
    place = copy_of(prepared, prepared.folder.with_name("plain"), lora=lora())
    assert place.main(STAGE, TENSORBOARD_LOGGING_DIR=str(place.folder / "tensorboard")) == 0
    return place


@pytest.fixture(scope="module")
def stopped(prepared: Workplace) -> Workplace:
    """Trained at a rate at which the validation loss soon grows, with early stopping."""
    place = copy_of(
        prepared, prepared.folder.with_name("stopped"), lora=lora(), learning_rate=0.9, lr_scheduler="constant",
        max_gradient_norm=100.0, max_steps=40, evaluate_every_steps=2, early_stopping_patience=2,
    )  # fmt: skip
    # Validation's 12 rows are then a batch of 8 and one of 4.
    assert place.main(STAGE, MICRO_BATCH_SIZE="8") == 0
    return place


def files(place: Workplace) -> dict[str, bytes]:
    """Every file of the adapter."""
    folder = place.folder / ADAPTER
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(place: Workplace, name: str) -> dict[int, float]:
    """A loss that the training log has, by step."""
    path = place.folder / ADAPTER / f"training_log/plots/metrics/{name}.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")}


def summary(place: Workplace) -> dict[str, Any]:
    return json.loads((place.folder / ADAPTER / "training_log/summary.json").read_text(encoding="utf-8"))


def weights(place: Workplace) -> dict[str, torch.Tensor]:
    return load_file(place.folder / ADAPTER / "adapter_model.safetensors")


def has_checkpoint(place: Workplace, step: int) -> bool:
    """Whether a checkpoint was written to its end: its hashes come last."""
    return any((place.folder / "checkpoints").glob(f"*/checkpoint-{step}/{HASHES}"))


# --- interruption -----------------------------------------------------------------------------------------------------


def test_a_killed_run_is_held_against_others_and_continues_to_the_very_same_adapter(
    prepared: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout, so that the random state has to be restored too.
    settings = {"lora": lora(dropout=0.2), "max_steps": 60, "evaluate_every_steps": 5}
    whole = copy_of(prepared, tmp_path / "whole", **settings)
    killed = copy_of(prepared, tmp_path / "killed", **settings)
    with subprocess.Popen(
        [sys.executable, "-m", STAGE], cwd=killed.folder, env=killed.environment(), stdout=subprocess.DEVNULL
    ) as process:
        while not has_checkpoint(killed, 5):
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr("stages.common.training.checkpoints.SECONDS_TO_WAIT", 0.1)
        assert killed.main(STAGE) == 1
        assert "another process is training this very run" in capfd.readouterr().err
        process.kill()
    assert not (killed.folder / ADAPTER).exists()

    # Python orders sets by this seed, differently in each process.
    resumed = killed.run(STAGE, PYTHONHASHSEED="1")
    assert resumed.returncode == 0, resumed.stderr
    start = re.search(r"16 rows x 1 a step, from checkpoint-(\d+)", resumed.stdout)
    assert start is not None, resumed.stdout
    assert 5 <= int(start[1]) < 60
    assert whole.main(STAGE) == 0
    assert files(killed) == files(whole)


def test_a_loss_that_is_no_number_stops_the_run_with_advice_and_leaves_no_adapter(
    prepared: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copy_of(prepared, tmp_path / "project")
    broken = load_file(place.folder / "base/model.safetensors")
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, place.folder / "base/model.safetensors", {"format": "pt"})
    place.set("base_model.path", "base")
    assert place.main("stages.base_model") == 0
    assert place.main(STAGE) == 1
    message = capfd.readouterr().err
    assert "the loss became nan by step 1: training diverged. Lower finetune.learning_rate" in message
    assert not (place.folder / ADAPTER).exists()


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_step_in_several_micro_batches_has_the_same_losses(
    prepared: Workplace, plain: Workplace, tmp_path: Path
) -> None:
    place = copy_of(prepared, tmp_path / "project", lora=lora())
    assert place.main(STAGE, MICRO_BATCH_SIZE="4") == 0
    for name in ("train/loss", "eval/loss"):
        assert losses(place, name).keys() == losses(plain, name).keys()
        assert list(losses(place, name).values()) == pytest.approx(list(losses(plain, name).values()), abs=1e-3)
    for name, expected in weights(plain).items():
        assert torch.allclose(weights(place)[name], expected, atol=1e-3), name


def test_running_out_of_memory_halves_the_micro_batch(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = copy_of(prepared, tmp_path / "small", lora=lora())
    assert small.main(STAGE, MICRO_BATCH_SIZE="4") == 0
    compute_loss = AnswerLossTrainer.compute_loss

    def limited(self: AnswerLossTrainer, model: Any, inputs: dict[str, torch.Tensor], *more: Any, **named: Any) -> Any:
        if len(inputs["boundaries"]) - 2 > 4:
            raise torch.OutOfMemoryError
        return compute_loss(self, model, inputs, *more, **named)

    monkeypatch.setattr(AnswerLossTrainer, "compute_loss", limited)
    place = copy_of(prepared, tmp_path / "project", lora=lora())
    capfd.readouterr()
    assert place.main(STAGE) == 0
    tried = re.findall(r"finetune: (\d+) rows x (\d+) a step, from the start", capfd.readouterr().out)
    assert tried == [("16", "1"), ("8", "2"), ("4", "4")]
    assert files(place) == files(small)


# --- the best checkpoint ----------------------------------------------------------------------------------------------


def test_training_stops_when_the_validation_loss_has_not_improved_for_so_many_evaluations(stopped: Workplace) -> None:
    found = losses(stopped, "eval/loss")
    best = min(found, key=lambda step: found[step])
    assert summary(stopped)["steps"] == max(found) == best + 2 * 2 < 40


def test_the_adapter_of_the_best_evaluation_is_kept_and_its_loss_is_the_mean_over_all_answer_tokens(
    stopped: Workplace,
) -> None:
    found = losses(stopped, "eval/loss")
    assert summary(stopped)["best_validation_loss"] == pytest.approx(min(found.values()))
    assert found[summary(stopped)["best_step"]] == min(found.values()) < found[max(found)]
    rows = pq.read_table(stopped.folder / "data/splits/validation.parquet").to_pylist()
    with stopped.entered():
        model = load_model(ADAPTER)
    total, tokens = 0.0, 0
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= float(scores.gather(1, ids[0, start:, None]).sum())
        tokens += len(row["completion_ids"])
    # Answers differ in length here, so a mean of the rows' means, or of the batches', would be another number.
    assert len({len(row["completion_ids"]) for row in rows}) > 1
    assert total / tokens == pytest.approx(summary(stopped)["best_validation_loss"], rel=1e-4)


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_the_environment_turns_tensorboard_on(plain: Workplace, stopped: Workplace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (plain.folder / "tensorboard").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    for name in ("train/loss", "eval/loss"):
        found = {event.step: event.value for event in log.Scalars(name)}
        assert found.keys() == losses(plain, name).keys()
        assert list(found.values()) == pytest.approx(list(losses(plain, name).values()), rel=1e-6)
    assert not list(stopped.folder.rglob("events.out.tfevents.*"))


def test_the_environment_turns_weights_and_biases_on(prepared: Workplace, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; `.venv/bin/pip install wandb` to run this")
    place = copy_of(prepared, tmp_path / "project", lora=lora())
    # In a process of its own: wandb keeps its service and its run for as long as a process lives.
    result = place.run(STAGE, WANDB_MODE="offline", WANDB_PROJECT="reviews", WANDB_DIR=str(place.folder))
    assert result.returncode == 0, result.stderr
    (run,) = place.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert all(name in run.read_bytes() for name in (b"train/loss", b"eval/loss"))
    assert not [name for name in files(place) if "wandb" in name]


def test_the_adapter_is_complete_and_says_neither_where_nor_when_it_was_made(plain: Workplace) -> None:
    found = files(plain)
    assert found.keys() >= {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "prompt.json", "provenance.json", "README.md",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_log/summary.json",
    }  # fmt: skip
    assert not [name for name in found if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    places = [str(plain.folder.parent), str(ROOT), str(Path.home())]
    for name, content in found.items():
        text = content.decode("utf-8", "replace")
        assert not [place for place in places if len(place) > 1 and place in text], name
        assert not re.search(r"20\d\d-[01]\d-[0-3]\d|[0-2]\d:[0-5]\d:[0-5]\d", text), name


def test_lora_weights_are_float32_while_they_are_trained_and_when_they_are_saved(
    prepared: Workplace, plain: Workplace, tmp_path: Path
) -> None:
    # Reading the best checkpoint back makes the saved weights float32 anyway, so they alone would show nothing.
    with prepared.entered():
        finetune, whole_step = load_params("finetune").finetune, MicroBatch(16, 1, recompute_activations=False)
        trainer = make_trainer(finetune, whole_step, tmp_path, read_rows(PARTS, "none", 0, tmp_path / "datasets"))
    assert {weight.dtype for weight in trainer.adapter.parameters() if weight.requires_grad} == {torch.float32}
    assert {tensor.dtype for tensor in weights(plain).values()} == {torch.float32}
    modules = {re.sub(r".*\.(\w+_proj)\..*", r"\1", name) for name in weights(plain)}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_resumed_run_remembers_how_long_the_loss_has_not_improved(prepared: Workplace, tmp_path: Path) -> None:
    place = copy_of(prepared, tmp_path / "project", lora=lora(), early_stopping_patience=3)
    with place.entered():
        finetune, whole_step = load_params("finetune").finetune, MicroBatch(16, 1, recompute_activations=False)
        trainer = make_trainer(finetune, whole_step, tmp_path, read_rows(PARTS, "none", 0, tmp_path / "datasets"))
    stored = EarlyStoppingCallback(3)
    stored.early_stopping_patience_counter = 2
    trainer.state.stateful_callbacks = {"EarlyStoppingCallback": stored.state()}  # type: ignore[assignment]
    trainer._load_callback_state()
    (restored,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, EarlyStoppingCallback))
    assert restored.early_stopping_patience_counter == 2


def test_a_run_that_has_ended_is_not_trained_again_and_keeps_no_checkpoint(plain: Workplace, tmp_path: Path) -> None:
    place = copy_of(plain, tmp_path / "project")
    shutil.rmtree(place.folder / ADAPTER)
    again = place.run(STAGE)
    assert "has ended before" in again.stdout, again.stderr
    assert files(place) == files(plain)
    assert not list((place.folder / "checkpoints").glob("*/checkpoint-*"))


# --- every kind of task -----------------------------------------------------------------------------------------------

SEVERAL = {
    "kind": "classification", "multi_label": True, "labels": ["good", "short"], "label_descriptions": None,
    "positive_label": None,
}  # fmt: skip


def split_rows(kind: str) -> tuple[Any, list[dict[str, Any]]]:
    """A footer and twelve rows; what is to be learned follows from the prompt's last token."""
    rows: list[dict[str, Any]] = []
    for index in range(12):
        prompt = [5, 60, 61 + index % 3]
        row: dict[str, Any] = {"label": "fine", "prompt_ids": prompt, "completion_ids": [90 + index % 3, TERMINATOR]}
        if kind == "multi_label":
            row["label"] = ["[]", '["good"]', '["good", "short"]'][index % 3]
        if kind == "chat":
            row["prompt_answer_mask"] = [False, True, False]
        rows.append(row)
    if kind == "multi_label":
        return multi_label_format({"good": [70], "short": [70, 71]}, yes=80, no=81), rows
    return prompt_format(kind), rows


def sharpen_base(place: Workplace) -> None:
    """Let the base be sure of something: its random weights alone give every token nearly the same probability."""
    weights = load_file(place.folder / "base/model.safetensors")
    weights["model.norm.weight"] *= 30
    save_file(weights, place.folder / "base/model.safetensors", {"format": "pt"})
    place.set("base_model.path", "base")
    assert place.main("stages.base_model") == 0


@pytest.mark.parametrize("kind", ["multi_label", "question_answering", "chat"])
def test_every_kind_of_task_is_learned_and_predicted(prepared: Workplace, tmp_path: Path, kind: str) -> None:
    place = copy_of(
        prepared, tmp_path / "project", lora=lora(), learning_rate=0.01, max_steps=60, evaluate_every_steps=20,
        global_batch_size=12,
    )  # fmt: skip
    sharpen_base(place)
    place.set("task", SEVERAL if kind == "multi_label" else {"kind": kind})
    if kind != "multi_label":
        place.set("infer", {"method": "generate", "max_new_tokens": 4})
    footer, rows = split_rows(kind)
    for part in ("train", "validation", "test"):
        write_split(place.folder / f"data/splits/{part}.parquet", footer, rows)
    assert place.main(STAGE) == 0
    assert place.main("stages.infer") == 0
    found = json.loads((place.folder / ADAPTER / "prompt.json").read_text(encoding="utf-8"))
    assert (found["kind"], found["terminator_ids"]) == (kind, [TERMINATOR])
    # Rows are counted in the file; a row of two labels is two questions to learn.
    provenance = json.loads((place.folder / ADAPTER / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["data"]["train"]["rows"] == 12
    assert summary(place)["rows_available"] == (24 if kind == "multi_label" else 12)
    table = pq.read_table(place.folder / "data/predictions/adapter/test.parquet").to_pydict()
    if kind == "multi_label":
        assert table["prediction"] == table["label"]
    else:
        # ln 0.5: of an answer and its end together, out of 400 tokens each.
        assert min(table["reference_log_likelihood"]) > -0.69
        assert len(set(table["prediction"])) == 3


@pytest.mark.parametrize("class_balance", ["weighted_loss", "oversample"])
def test_rare_labels_are_balanced_as_params_say(prepared: Workplace, tmp_path: Path, class_balance: str) -> None:
    runs = {}
    for balance in ("none", class_balance):
        place = copy_of(prepared, tmp_path / balance, lora=lora(), class_balance=balance)
        train = place.folder / "data/splits/train.parquet"
        table = pq.read_table(train)
        # 32 of each label: of "good" every fourth is kept.
        kept = [index for index, label in enumerate(table["label"].to_pylist()) if label != "good" or index % 4 == 0]
        few = sum(table["label"][index].as_py() == "good" for index in kept)
        pq.write_table(table.take(kept), train)
        assert place.main(STAGE) == 0
        runs[balance] = place
    assert 0 < few < 32
    assert summary(runs[class_balance])["rows_available"] == (96 if class_balance == "oversample" else 64 + few)
    assert losses(runs["none"], "train/loss") != losses(runs[class_balance], "train/loss")
    assert all(loss < 20 for loss in losses(runs[class_balance], "eval/loss").values())


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_of_lora_are_trained_and_loaded(
    prepared: Workplace, plain: Workplace, tmp_path: Path, variant: str
) -> None:
    place = copy_of(prepared, tmp_path / "project", lora=lora(**{variant: True}))
    assert place.main(STAGE) == 0
    configuration = json.loads((place.folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert configuration[variant] is True
    assert any("lora_magnitude_vector" in name for name in weights(place)) == (variant == "use_dora")
    assert losses(place, "eval/loss") != losses(plain, "eval/loss")
    with place.entered():
        load_model(ADAPTER)
