"""A project of its own with a tiny base model and 120 reviews, whose stages run in this process or another one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.common.errors import run_stage
from tests.tiny import save_base_model

ROOT = Path(__file__).resolve().parents[1]
REVIEWS = Path("data/raw/reviews.csv")
WORDS = {"bad": ["awful", "poor", "nasty"], "so-so": ["okay", "plain", "usual"], "good": ["fine", "great", "lovely"]}
# What keeps a stage quiet, offline and on the CPU, whatever the machine's own environment says.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
UNWANTED = ("HF_TOKEN", "HF_ENDPOINT", "MICRO_BATCH_SIZE", "TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_API_KEY")


class Workplace:
    """A folder with params.yaml, a table, and whatever the stages made there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, key: str, value: Any) -> None:
        """Change one key of params.yaml."""
        values = self.params()
        block, last = self._block(values, key)
        block[last] = value
        self._write_params(values)

    def remove(self, key: str) -> None:
        """Take one key out of params.yaml."""
        values = self.params()
        block, last = self._block(values, key)
        del block[last]
        self._write_params(values)

    def params(self) -> dict[str, Any]:
        return YAML(typ="safe").load(self.folder / "params.yaml")

    def write(self, name: str | Path, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def append(self, line: str) -> None:
        """Add a row to the reviews."""
        self.write(REVIEWS, (self.folder / REVIEWS).read_text(encoding="utf-8") + line + "\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m ...` here, in a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder, env=self.environment(**environment), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        """What a stage's process here is to see."""
        own = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        return own | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "CHECKPOINT_DIR": str(self.folder / "checkpoints")} | more

    @contextmanager
    def entered(self, **environment: str) -> Iterator[pytest.MonkeyPatch]:
        """This process works here until the block ends."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name in UNWANTED:
                patch.delenv(name, raising=False)
            for name, value in self.environment(**environment).items():
                patch.setenv(name, value)
            if "torch" in sys.modules:
                # A process that has used a GPU no longer looks at CUDA_VISIBLE_DEVICES.
                patch.setattr("torch.cuda.is_available", lambda: False)
            yield patch

    def main(self, *command: str, **environment: str) -> int:
        """Run a stage here, in this process; its exit code. What is no fault of a user's is raised."""
        module = import_module(command[0])
        with self.entered(**environment) as patch:
            patch.setattr(sys, "argv", list(command))
            try:
                run_stage(module.main)
            except SystemExit as exit:
                assert isinstance(exit.code, int)
                return exit.code
        return 0

    def run_up_to_splits(self) -> None:
        """Run all that training needs, in this process."""
        for stage in ("base_model", "ingest", "format_prompts", "split"):
            assert self.main(f"stages.{stage}") == 0

    def _write_params(self, values: dict[str, Any]) -> None:
        YAML(typ="safe").dump(values, self.folder / "params.yaml")

    @staticmethod
    def _block(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
        *path, last = key.split(".")
        for part in path:
            values = values[part]
        return values, last


def reviews(rows: int = 120) -> str:
    """A CSV of short reviews whose words give the label away."""
    randomness = random.Random(0)
    lines = ["number,review,opinion"]
    for number in range(rows):
        opinion = list(WORDS)[number % 3]
        first, second = randomness.choice(WORDS[opinion]), randomness.choice(WORDS[opinion])
        lines.append(f"{number},the {first} film of day {number} was {second},{opinion}")
    return "\n".join(lines) + "\n"


def make_workplace(folder: Path) -> Workplace:
    """A project whose params.yaml is complete; no stage has run in it."""
    place = Workplace(folder)
    place.write("params.yaml", (ROOT / "recipes/tweet-sentiment.yaml").read_bytes())
    place.write(REVIEWS, reviews())
    save_base_model(folder / "base")
    place.set("base_model", {"source": "folder", "path": "base"})
    place.set("task.labels", ["bad", "so-so", "good"])
    place.set("ingest.source", {"kind": "files", "paths": [REVIEWS.as_posix()], "format": None})
    columns = {"id": "number", "text": "review", "label": "opinion", "group": None, "split": None, "slice": None}
    place.set("ingest.columns", columns)
    place.set("format_prompts.template", "Review: {{ text }}\nOpinion:")
    place.set("finetune.max_steps", 6)
    place.set("finetune.evaluate_every_steps", 3)
    place.write("data/code/finetune.sha256", "0" * 64 + "\n")
    return place
