"""What only a CUDA device can show; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.common.model import load_model, machine_device
from stages.common.params import load_params
from stages.common.scoring.batches import TOKENS_PER_GENERATED_BATCH
from stages.common.scoring.generation import generate_answers
from stages.common.scoring.label_scores import score_labels
from stages.common.scoring.references import score_references
from stages.common.training.rows import longest_row, read_rows
from stages.common.training.trainer import TOKENS_PER_MICRO_BATCH
from stages.finetune import PARTS, train
from tests.tiny import make_tokenizer
from tests.workplace import Workplace, make_workplace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits, whose steps are large enough to fill some GPU memory."""
    place = make_workplace(tmp_path_factory.mktemp("gpu") / "project")
    place.set("finetune.global_batch_size", 64)
    for stage in ("stages.base_model", "stages.ingest", "stages.format_prompts", "stages.split"):
        assert place.main(stage) == 0
    return place


def train_losses(folder: Path) -> list[float]:
    """Losses of training in this process on the GPU, with prompts of some 400 tokens."""
    rows = {
        name: part.map(lambda row: {"prompt_ids": row["prompt_ids"] * 8})
        for name, part in read_rows(PARTS, "none", 0, folder / "datasets").items()
    }
    assert TOKENS_PER_MICRO_BATCH["cuda"] // longest_row(rows.values()) >= 64, "the first guess is the whole step"
    trainer = train(load_params("finetune").finetune, folder, rows)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_running_out_of_memory_makes_the_micro_batch_smaller_and_the_losses_stay(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared.folder)
    whole = train_losses(tmp_path / "whole")
    assert "64 rows x 1 a step" in capsys.readouterr().out
    gc.collect()
    torch.cuda.empty_cache()
    share = 0.75 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        cut = train_losses(tmp_path / "cut")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().out
    assert "64 rows at a time do not fit" in said
    assert "32 rows x 2 a step" in said
    # bfloat16 has eight bits of precision; the sums are cut in other places.
    np.testing.assert_allclose(cut, whole, rtol=0.02)


def test_labels_scored_in_bfloat16_on_the_gpu_agree_with_float32_on_the_cpu(
    prepared: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5 + index, 40, 41, 42, 60 + index] for index in range(32)]
    labels = [[70, 71, 2], [70, 72, 2], [80, 2]]
    monkeypatch.chdir(prepared.folder)
    assert machine_device().type == "cuda"
    on_gpu = score_labels(load_model(None), prompts, labels, 4096)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = score_labels(load_model(None), prompts, labels, 4096)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=0.1)


def test_references_scored_in_bfloat16_on_the_gpu_agree_with_float32_on_the_cpu(
    prepared: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5 + index, 40, 41, 42] * (1 + index % 5) for index in range(32)]
    references = [[70 + index, 71, 72, 2][index % 3 :] for index in range(32)]
    monkeypatch.chdir(prepared.folder)
    on_gpu = score_references(load_model(None), prompts, references, 4096)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = score_references(load_model(None), prompts, references, 4096)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=0.1)


def test_large_generated_batches_give_every_prompt_an_answer_of_its_own(
    prepared: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared.folder)
    model, tokenizer = load_model(None), make_tokenizer()
    prompts = [[5 + index % 200, 40, 41, 42] for index in range(2000)]
    most = TOKENS_PER_GENERATED_BATCH["cuda"]
    answers = generate_answers(model, tokenizer, prompts, [2], 16, most)
    assert len(answers) == 2000
    # Equal prompts are equal rows of one batch; bfloat16 may still round two of them apart where tokens are as likely.
    same = sum(answers[index] == answers[index + 200] for index in range(1800))
    assert same > 0.9 * 1800
    # Memory that runs out makes batches smaller, and costs no answer.
    model.register_forward_pre_hook(_run_out_above_100_rows, with_kwargs=True)
    assert len(generate_answers(model, tokenizer, prompts[:400], [2], 4, most)) == 400


def _run_out_above_100_rows(_module: torch.nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
    if len(named["input_ids"]) > 100:
        raise torch.OutOfMemoryError
