"""What only a CUDA device can show; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from stages.common.acceleration.attention import packed_attention
from stages.common.acceleration.choice import fast_paths
from stages.common.model import load_model, machine_device
from stages.common.params import load_params
from stages.common.scoring.batches import TOKENS_PER_GENERATED_BATCH
from stages.common.scoring.generation import generate_answers
from stages.common.scoring.label_predictions import posterior
from stages.common.scoring.label_scores import _score_each_label, language_model, score_labels
from stages.common.scoring.loading import load_fast_model
from stages.common.scoring.references import score_references
from stages.common.scoring.tree_attention import Trees
from stages.common.tables import read_table, table_metadata
from stages.common.training.collating import collate_packed
from stages.common.training.rows import longest_row, read_rows
from stages.common.training.trainer import TOKENS_PER_MICRO_BATCH, MicroBatch, make_trainer
from stages.finetune import ADAPTER, PARTS, train
from stages.infer import label_ids
from tests.tiny import make_tokenizer
from tests.workplace import Workplace, make_workplace

ROOT = Path(__file__).resolve().parents[1]
# Between the two likeliest labels' probabilities: below it, rounding to bfloat16 may decide.
CLOSE_CALL = 0.1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits, whose steps are large enough to fill some GPU memory."""
    place = make_workplace(tmp_path_factory.mktemp("gpu") / "project")
    place.set("finetune.global_batch_size", 64)
    place.run_up_to_splits()
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


PLAIN = {"PACK_ROWS": "0", "DENSE_BASE": "0", "RECORD_STEPS": "0"}


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_fast_paths_train_to_the_losses_of_the_plain_one(
    prepared: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiled: str,
) -> None:
    monkeypatch.chdir(prepared.folder)
    monkeypatch.setenv("COMPILE_LAYERS", compiled)
    fast = train_losses(tmp_path / "fast")
    said = capsys.readouterr().out
    assert "fast paths: rows without padding, the base dequantised in memory" in said
    assert "steps recorded" in said.split(";")[0]
    monkeypatch.setenv("COMPILE_LAYERS", "0")
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    plain = train_losses(tmp_path / "plain")
    assert "fast paths: none" in capsys.readouterr().out
    # bfloat16 has eight bits of precision; sums are made in another order.
    np.testing.assert_allclose(fast, plain, rtol=0.02)


@pytest.mark.parametrize("most_recordings", [16, 1])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_gradients_of_recorded_steps_are_those_of_steps_run_as_they_come(
    prepared: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weighted: bool,
    accumulation: int,
    most_recordings: int,
) -> None:
    monkeypatch.chdir(prepared.folder)
    monkeypatch.setattr("stages.common.training.answer_loss.MOST_RECORDINGS", most_recordings)
    parts = range(accumulation)
    # Other rows each time, so that a replay of old inputs would show; the last batch of the third step is longer.
    steps = [
        [batch_of(10 * step + part, 90 if (step, part) == (2, accumulation - 1) else 60, weighted) for part in parts]
        for step in range(4)
    ]
    rows = Dataset.from_list([row for step in steps for batch in step for row in batch])
    micro = MicroBatch(rows=3, accumulation=accumulation, recompute_activations=False)
    params = load_params("finetune").finetune
    trainer = make_trainer(params, micro, tmp_path, {"train": rows, "validation": rows})
    assert trainer.records_steps
    model = trainer.accelerator.prepare(trainer.model)
    trained = [weight for weight in trainer.adapter.parameters() if weight.requires_grad]
    for weight in trained:
        torch.nn.init.normal_(weight, std=0.05)

    def losses_and_gradients(batches: list[dict[str, torch.Tensor]]) -> tuple[list[float], list[torch.Tensor]]:
        trainer.adapter.zero_grad()
        count = trainer._get_num_items_in_batch(batches, torch.device("cuda"))
        losses = [float(trainer.training_step(model, dict(batch), count)) for batch in batches]
        return losses, [weight.grad.clone() for weight in trained if weight.grad is not None]

    for step in steps:
        batches = [collate_packed(batch, pad_id=0) for batch in step]
        trainer.records_steps = True
        recorded = losses_and_gradients(batches)
        assert len(recorded[1]) == len(trained)
        trainer.records_steps = False
        eager = losses_and_gradients(batches)
        assert recorded[0] == pytest.approx(eager[0], rel=1e-3)
        for found, expected in zip(recorded[1], eager[1], strict=True):
            error = (found - expected).norm() / expected.norm()
            # Sums of bfloat16 products in another order; a gradient of other rows differs by about its own length.
            assert error < 0.02
        with torch.no_grad():
            # As the optimizer does it, in place: the next replay must see it.
            for weight in trained:
                weight.add_(torch.randn_like(weight), alpha=0.01)
    assert len(trainer._recordings) == min(most_recordings, 2)


def batch_of(seed: int, tokens: int, weighted: bool) -> list[dict[str, Any]]:
    """Three rows of so many tokens together, whatever the seed."""
    generator = np.random.default_rng(seed)
    lengths = [10 + seed % 3, 20, tokens - 30 - seed % 3]
    return [
        {"prompt_ids": generator.integers(5, 400, length).tolist(), "completion_ids": [70 + seed % 5, 2]}
        | ({"weight": float(generator.uniform(0.2, 2))} if weighted else {})
        for length in lengths
    ]


def test_little_memory_costs_no_accuracy(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared.folder)
    plenty = train_losses(tmp_path / "plenty")
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    monkeypatch.setenv("LOW_MEMORY", "1")
    np.testing.assert_allclose(train_losses(tmp_path / "little"), plenty, rtol=0.02)
    assert "activations recomputed" in capsys.readouterr().out
    # What is left is the base, evaluation, and cuBLAS's own memory.
    assert torch.cuda.max_memory_allocated() < 0.75 * peak


@pytest.mark.parametrize("prefix", [0, 20])
def test_flash_attention_over_trees_is_that_written_out(prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, nodes, filling = [5, 130, 17], 3, 4
    ends = np.cumsum([0, prefix, *lengths, filling])
    keys = [np.arange(prefix)]
    for first, last in pairwise(ends[1:-1]):
        keys += [np.arange(prefix), np.arange(first, last)]
    keys.append(np.arange(ends[-2], ends[-1]))
    seen = np.cumsum([0, prefix, *(prefix + length for length in lengths), filling])
    ancestors = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    arrays = [ends.astype(np.int32), np.concatenate(keys), seen.astype(np.int32)]
    boundaries, places, key_boundaries = (torch.from_numpy(array).cuda() for array in arrays)
    of_nodes = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda") * nodes
    layout = Trees(boundaries, places, key_boundaries, prefix + 130, of_nodes, ancestors.cuda())
    total = int(ends[-1]) + len(lengths) * nodes
    q, k, v = (torch.randn(1, heads, total, 16, generator=generator).cuda() for heads in (4, 2, 2))
    module = torch.nn.Module()
    exact, _ = packed_attention(module, q, k, v, None, layout=layout)
    found, _ = packed_attention(module, q.bfloat16(), k.bfloat16(), v.bfloat16(), None, layout=layout)
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


def test_fast_scores_are_those_of_each_label_by_itself(
    prepared: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared.folder)
    generator = np.random.default_rng(0)
    prompts = [[9] * 20 + generator.integers(5, 400, length).tolist() for length in generator.integers(1, 60, 200)]
    labels = [[70, 71, 2], [70, 72, 2], [80, 2]]
    with torch.inference_mode():
        plain = np.array(_score_each_label(language_model(load_model(None)), prompts, labels, 4096, lambda _rows: None))
    for compiled in ("0", "1"):
        monkeypatch.setenv("COMPILE_LAYERS", compiled)
        model = load_fast_model(None, 0, scores_labels=True)
        assert fast_paths(language_model(model)).recorded is None
        # So many batches are replayed, and one that is not full is among them.
        np.testing.assert_allclose(score_labels(model, prompts, labels, 500), plain, atol=0.1)


def test_on_real_rows_fast_paths_decide_as_float32_does_but_for_close_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if not (ADAPTER / "adapter_model.safetensors").is_file() or not PARTS["train"].is_file():
        pytest.skip("there is no trained adapter here: `dvc repro` or `dvc pull` makes it")
    labels = list(label_ids(table_metadata(PARTS["train"], "prompt_format")).values())
    prompts = read_table(PARTS["train"], ["prompt_ids"])["prompt_ids"].to_pylist()[:2000]
    assert len(prompts) == 2000

    def each_label_by_itself() -> np.ndarray:
        model = language_model(load_model(ADAPTER))
        with torch.inference_mode():
            return posterior(np.array(_score_each_label(model, prompts, labels, 16_384, lambda _rows: None)))

    found = {
        "fast": posterior(score_labels(load_fast_model(ADAPTER, 0, scores_labels=True), prompts, labels, 16_384)),
        "plain": each_label_by_itself(),
    }
    monkeypatch.setattr("stages.common.model.compute_dtype", lambda _device: torch.float32)
    exact = each_label_by_itself()
    ranked = np.sort(exact, axis=1)
    margins = ranked[:, -1] - ranked[:, -2]
    errors = {}
    for name, probabilities in found.items():
        changed = probabilities.argmax(axis=1) != exact.argmax(axis=1)
        errors[name] = np.abs(probabilities - exact)
        print(
            f"{name}: {changed.sum()} of {len(prompts)} rows decided otherwise than in float32, of margins to "
            f"{margins[changed].max(initial=0):.3f}; error of a probability {errors[name].mean():.5f}, at most "
            f"{errors[name].max():.3f}"
        )
        assert not (changed & (margins > CLOSE_CALL)).any(), name
    assert errors["fast"].mean() < 1.5 * errors["plain"].mean(), "rounding the merged weights costs about as much"


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
