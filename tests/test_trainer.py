"""Cutting an optimizer step to fit the machine, and what the environment asks for."""

from __future__ import annotations

import pytest

from stages.common.errors import UserError
from stages.common.training.callbacks import trackers
from stages.common.training.trainer import micro_batches


def test_micro_batch_times_accumulation_is_always_the_global_batch() -> None:
    for global_batch_size in (1, 2, 7, 12, 16, 48, 64):
        for max_length_tokens in (16, 128, 4096):
            for device_type in ("cpu", "cuda"):
                ways = micro_batches(global_batch_size, max_length_tokens, device_type)
                assert all(way.rows * way.accumulation == global_batch_size for way in ways)
                assert [way.rows for way in ways[:-1]] == sorted({way.rows for way in ways}, reverse=True)
                assert ways[-1].rows == 1
                assert ways[-1].recompute_activations


def test_long_rows_make_small_first_guesses() -> None:
    assert micro_batches(16, 64, "cpu")[0].rows == 16
    assert micro_batches(16, 512, "cpu")[0].rows == 4
    assert micro_batches(16, 100_000, "cpu")[0].rows == 1


def test_the_environment_may_choose_a_divisor_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_BATCH_SIZE", "2")
    assert [way.rows for way in micro_batches(8, 64, "cpu")] == [2, 1, 1]
    for wrong in ("3", "16", "0", "many"):
        monkeypatch.setenv("MICRO_BATCH_SIZE", wrong)
        with pytest.raises(UserError, match="must divide"):
            micro_batches(8, 64, "cpu")


def test_trackers_are_used_when_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert trackers() == []
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "runs")
    assert trackers() == ["tensorboard"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("WANDB_PROJECT", "p")
    with pytest.raises(UserError, match="tensorboard, wandb, which is not installed"):
        trackers()
