"""What happens beside the training steps: logging, checkpoints by the clock, stopping when the loss is no number."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path
from typing import Any

from dvclive import Live
from scmrepo.exceptions import SCMError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.common.errors import UserError

# Everything else that the trainer logs is a timing or follows from the parameters; timings would make two equal
# adapters differ.
LOGGED = {
    "loss": "train/loss",
    "grad_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "eval_loss": "eval/loss",
}


class DVCLiveLog(TrainerCallback):
    """Logs losses to a DVCLive folder; a resumed run first replays what its checkpoint remembers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start an empty log, and bring it up to the checkpoint."""
        try:
            # dvcyaml=None: DVCLive would rewrite dvc.yaml while `dvc repro` runs it.
            self._live = Live(str(self._folder), dvcyaml=None, save_dvc_exp=False, report=None)
        except SCMError as error:
            raise UserError(f"DVCLive cannot use this Git repository ({error}): commit once, then run again") from error
        for entry in state.log_history:
            self._log(entry, int(entry["step"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append what the trainer logs."""
        self._log(logs or {}, state.global_step)

    def _log(self, entry: dict[str, float], step: int) -> None:
        # In LOGGED's order: a checkpoint returns its entries sorted, and DVCLive's summary keeps the order it is given.
        values = {LOGGED[name]: entry[name] for name in LOGGED if math.isfinite(entry.get(name, math.nan))}
        if values:
            self._live.step = step
            for name, value in values.items():
                self._live.log_metric(name, value)
            self._live.make_summary()


class Watch(TrainerCallback):
    """Stops at a loss that is no number, and saves a checkpoint when the last one is some minutes old."""

    def __init__(self) -> None:
        self._seconds_between = 60 * _minutes_between_checkpoints()
        self._saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint when it is time."""
        if time.monotonic() - self._saved_at > self._seconds_between:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start counting again."""
        self._saved_at = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Refuse to train on with a loss that can only stay broken."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"the {name} became {logs[name] if logs else None} by step {state.global_step}: training diverged. "
                    "Lower finetune.learning_rate, or raise finetune.warmup_steps."
                )


def _minutes_between_checkpoints() -> float:
    minutes = os.environ.get("CHECKPOINT_EVERY_MINUTES", "10")
    try:
        return float(minutes)
    except ValueError:
        raise UserError(f"CHECKPOINT_EVERY_MINUTES={minutes} in the environment must be a number, as 10") from None


def trackers() -> list[str]:
    """The experiment trackers that the environment asks for, as transformers names them.

    TensorBoard where TENSORBOARD_LOGGING_DIR is set, Weights & Biases where WANDB_PROJECT or WANDB_API_KEY is.

    Raises:
        UserError: a tracker is asked for and not installed.
    """
    asked = {
        "tensorboard": "TENSORBOARD_LOGGING_DIR" in os.environ,
        "wandb": "WANDB_PROJECT" in os.environ or "WANDB_API_KEY" in os.environ,
    }
    wanted = [name for name, is_asked in asked.items() if is_asked]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the environment asks for {', '.join(missing)}, which is not installed: "
            f"`.venv/bin/pip install {' '.join(missing)}`, or unset "
            "TENSORBOARD_LOGGING_DIR, WANDB_PROJECT and WANDB_API_KEY"
        )
    return wanted
