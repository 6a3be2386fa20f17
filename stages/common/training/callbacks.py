"""What happens beside the training steps: logging, checkpoints, stopping at a signal or when the loss is no number."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from dvclive import Live
from scmrepo.exceptions import SCMError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.common.errors import Stopped, UserError
from stages.common.processes import largest
from stages.common.switches import minutes_between_checkpoints
from stages.common.tables import read_json, write_json
from stages.common.training.checkpoints import remove_old_checkpoints, seal
from stages.common.training.stopping import signal_that_came, steps_begin

if TYPE_CHECKING:
    from stages.common.training.answer_loss import AnswerLossTrainer

# Everything else that the trainer logs is a timing or follows from the parameters; timings would make two equal
# adapters differ.
LOGGED = {
    "loss": "train/loss",
    "grad_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "eval_loss": "eval/loss",
}
UNLOGGED = "unlogged_loss.json"
# What can be asked for after a step, besides the numbers of signals, which are larger.
GO_ON, SAVE = 0, 1


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


class DivergenceError(UserError):
    """The loss is no number.

    Attributes:
        step: the first of which that is known.
    """

    def __init__(self, what: str, now: int, step: int) -> None:
        super().__init__(
            f"{what} by step {now}: training diverged. Lower finetune.learning_rate, or raise finetune.warmup_steps."
        )
        self.step = step


class Watch(TrainerCallback):
    """Saves a checkpoint when the last one is some minutes old or a signal came; stops at a loss that is no number.

    A checkpoint is complete with the sums that the trainer keeps between two logged losses, so that a resumed run logs
    the very same ones, and with the hashes of its files.
    """

    def __init__(self, trainer: AnswerLossTrainer) -> None:
        self._trainer = trainer
        self._seconds_between = 60 * minutes_between_checkpoints()
        self._saved_at = time.monotonic()
        self._decision = GO_ON
        self._sums: list[tuple[int, torch.Tensor]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up what the checkpoint remembers of losses not logged yet."""
        steps_begin()
        path = _checkpoint(args, state) / UNLOGGED
        if path.is_file():
            unlogged = read_json(path)
            self._trainer._tr_loss += unlogged["loss"]
            self._trainer._globalstep_last_logged = unlogged["since_step"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint when it is time, unless this was the last step, which is followed by one anyway."""
        self._sums.append((state.global_step, self._trainer._tr_loss.clone()))
        is_due = time.monotonic() - self._saved_at > self._seconds_between
        self._decision = largest(signal_that_came() or (SAVE if is_due else GO_ON))
        if self._decision != GO_ON and not control.should_training_stop:
            control.should_save = True
        if control.should_save:
            self._refuse_broken_weights(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint, remove older ones, and end the training if a signal came."""
        trainer = self._trainer
        loss = trainer.accelerator.gather(trainer._tr_loss.view(1)).mean().item()  # all processes write by now
        if args.should_save:
            path = _checkpoint(args, state)
            write_json(path / UNLOGGED, {"loss": loss, "since_step": trainer._globalstep_last_logged})
            seal(path)
            remove_old_checkpoints(path.parent, state.best_global_step)
        self._saved_at = time.monotonic()
        if self._decision > SAVE and not control.should_training_stop:
            raise Stopped(
                self._decision, f"step {state.global_step} has a checkpoint, from which the same command goes on"
            )

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
                what = f"the {name} became {logs[name] if logs else None}"
                raise DivergenceError(what, state.global_step, self._first_broken(state.global_step))
        if "loss" in (logs or {}):
            self._sums.clear()

    def _refuse_broken_weights(self, step: int) -> None:
        """Otherwise the checkpoint would replace one whose weights are numbers."""
        trained = [weight.detach() for weight in self._trainer.adapter.parameters() if weight.requires_grad]
        total = torch.stack(torch._foreach_norm(trained)).sum() + self._sums[-1][1]
        if not self._trainer.accelerator.gather(total.view(1)).isfinite().all():
            raise DivergenceError("loss or weights became no numbers", step, self._first_broken(step))

    def _first_broken(self, now: int) -> int:
        """The first step since the last log after which the sum of losses was no number; `now` where all were."""
        if not self._sums:
            return now
        sums = torch.stack([total for _, total in self._sums])
        broken = ~self._trainer.accelerator.gather(sums[None]).isfinite().all(dim=0)
        return next((step for (step, _), is_broken in zip(self._sums, broken, strict=True) if is_broken), now)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


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
