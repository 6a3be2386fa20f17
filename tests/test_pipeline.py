"""The whole pipeline with real git, real dvc and a tiny real model: only what changed runs, and it can be reviewed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import EVERYTHING, REPORT, Project


@pytest.fixture(scope="module")
def project(finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the run and committed pipeline, for this module to change."""
    return finished_project.copy(tmp_path_factory.mktemp("pipeline") / "repository")


@pytest.fixture
def changed(project: Project) -> Iterator[Project]:
    """The project, put back to its last commit afterwards; DVC restores outputs from its cache."""
    yield project
    project.git("checkout", "-q", "--", ".")
    assert project.repro() <= {"code", *REPORT}


def test_nothing_changed_and_nothing_runs(project: Project) -> None:
    assert project.repro() == set()
    assert project.git("status", "--porcelain") == ""


def test_row_count_in_is_row_count_out(project: Project) -> None:
    import pandas as pd

    for part in ("validation", "test"):
        rows = pd.read_parquet(project.folder / f"data/splits/{part}.parquet")
        for predictor in ("adapter", "base", "tfidf", "majority"):
            predictions = pd.read_parquet(project.folder / f"data/predictions/{predictor}/{part}.parquet")
            assert list(predictions["id"]) == list(rows["id"])
            names = ["id", "label", "prediction", "probability.bad", "probability.so-so", "probability.good"]
            assert list(predictions.columns) == names


def test_the_adapter_folder_is_self_contained_and_loads_through_peft(project: Project) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = project.folder / "models/adapter"
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "prompt.json", "base.json"}
    assert names >= {"provenance.json", "README.md", "training_log"}
    base = AutoModelForCausalLM.from_pretrained(project.folder / "models/base")
    model = PeftModel.from_pretrained(base, str(adapter))
    assert any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())
    assert AutoTokenizer.from_pretrained(adapter).eos_token == "<|im_end|>"
    assert str(project.folder) not in "".join(
        path.read_text(encoding="utf-8") for path in adapter.glob("*.json") if path.name != "base.json"
    )


def test_a_changed_metric_parameter_runs_evaluate_alone(changed: Project) -> None:
    changed.edit_params("evaluate.bootstrap_samples", 500)
    assert changed.repro() - REPORT == {"evaluate"}


def test_a_changed_inference_method_runs_from_the_two_inference_stages(changed: Project) -> None:
    changed.edit_params("infer", {"method": "generate", "max_new_tokens": 8})
    assert changed.repro() - REPORT == {"infer", "infer_base", "evaluate"}
    assert 0 <= changed.metrics()["base"]["invalid_rate"] <= 1


def test_a_changed_learning_rate_trains_but_leaves_base_and_baseline_alone(changed: Project) -> None:
    changed.edit_params("finetune.learning_rate", 0.002)
    assert changed.repro() - REPORT == {"finetune", "infer", "evaluate"}


def test_a_new_template_runs_everything_but_base_model_and_ingest(changed: Project) -> None:
    changed.edit_params("format_prompts.template", "Read: {{ text }}\nIt is:")
    assert changed.repro() | REPORT == EVERYTHING - {"code", "base_model", "ingest"}


def test_one_changed_cell_runs_everything_from_ingest(changed: Project) -> None:
    changed.edit_file("data/raw/reviews.csv", "film of day 7 ", "book of day 7 ")
    assert changed.repro() | REPORT == EVERYTHING - {"code", "base_model"}


def test_a_comment_in_shared_code_runs_cheap_stages_only(changed: Project) -> None:
    changed.edit_file("stages/common/tables.py", "import json\n", "import json  # a comment\n")
    ran = changed.repro()
    assert ran == {"code", "base_model", "ingest", "format_prompts", "split", "baseline", "evaluate", *REPORT}


def test_a_real_edit_of_a_helper_of_training_runs_training_and_what_reads_the_adapter(changed: Project) -> None:
    changed.edit_file("stages/common/training/collating.py", "IGNORED = -100", "SPARE = 1\nIGNORED = -100")
    # The loss stays what it was, so the predictions do, and nothing behind them runs.
    assert changed.repro() - REPORT == {"code", "finetune", "infer"}


def test_a_real_edit_of_scoring_runs_both_inference_stages_and_no_training(changed: Project) -> None:
    changed.edit_file("stages/common/scoring/label_scores.py", "\nimport ", "\nSPARE = 1\nimport ")
    assert changed.repro() - REPORT == {"code", "infer", "infer_base"}


def test_a_broken_input_fails_readably_and_the_last_outputs_can_be_restored(changed: Project) -> None:
    before = changed.metrics()
    changed.edit_file("data/raw/reviews.csv", ",bad\n", ",dreadful\n")
    output = changed.dvc("repro", fails=True)
    assert "dreadful" in output
    assert "Traceback" not in output
    changed.git("checkout", "-q", "--", ".")
    changed.dvc("checkout")
    assert changed.metrics() == before
    assert (changed.folder / "models/adapter/adapter_model.safetensors").is_file()


def test_a_clone_that_pulled_nothing_shows_what_a_commit_changed(project: Project, tmp_path: Path) -> None:
    project.edit_params("finetune.learning_rate", 0.003)
    project.repro()
    project.git("commit", "-qam", "Raise the learning rate")
    clone = project.clone(tmp_path / "clone")
    metrics = json.loads(clone.dvc("metrics", "diff", "HEAD~1", "HEAD", "--json"))
    assert "adapter.log_loss" in metrics["metrics/metrics.json"]
    params = json.loads(clone.dvc("params", "diff", "HEAD~1", "HEAD", "--json"))
    assert params == {
        "params.yaml": {"finetune.learning_rate": {"diff": pytest.approx(0.002), "new": 0.003, "old": 0.001}}
    }
    clone.dvc("plots", "diff", "HEAD~1", "HEAD", "-o", "plots")
    page = (clone.folder / "plots/index.html").read_text(encoding="utf-8")
    for plot in ("Confusion matrix", "Training and validation loss"):
        assert plot in page
    assert not (clone.folder / "models/adapter").exists()


def test_a_parameter_put_back_restores_the_old_adapter_without_training(project: Project) -> None:
    adapter = project.folder / "models/adapter/adapter_model.safetensors"
    now = adapter.read_bytes()
    project.edit_params("finetune.learning_rate", 0.001)
    assert project.repro() <= REPORT
    assert adapter.read_bytes() != now
    project.git("checkout", "-q", "--", ".")
    assert project.repro() <= REPORT
    assert adapter.read_bytes() == now
    assert os.listdir(project.folder / ".dvc/checkpoints")  # noqa: PTH208
