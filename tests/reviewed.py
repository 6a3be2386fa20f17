"""A small repository with Git, DVC and a folder as remote, whose commits hold predictions to compare."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from review import compare
from stages import evaluate
from stages.common.errors import run_stage
from stages.common.predictions import write_answers
from tests.evaluated import Work, edit_params, write_split, write_training_log

DVC_YAML = """\
stages:
  split:
    cmd: 'true'
    params: [split, task]
    outs: [data/splits]
  infer:
    cmd: 'true'
    deps: [data/splits/validation.parquet, data/splits/test.parquet]
    params: [infer, task]
    outs: [data/predictions/adapter]
  baseline:
    cmd: 'true'
    outs: [data/predictions/base, data/predictions/tfidf, data/predictions/majority]
  finetune:
    cmd: 'true'
    deps: [data/splits/validation.parquet]
    params: [finetune]
    outs: [models/adapter]
  evaluate:
    cmd: 'true'
    deps: [data/predictions/adapter]
    params: [evaluate, task]
    outs: [models/decision.json]
    metrics:
      - metrics/metrics.json: {cache: false}
      - metrics/validation.json: {cache: false}
"""


class Reviewed:
    """The repository; `commit` measures what lies in data/ and commits it to both DVC and Git."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What DVC keeps outside of a repository stays with the test too.
        outside = {f"DVC_{name}_DIR": str(folder.parent / name.lower()) for name in ("GLOBAL_CONFIG", "SYSTEM_CONFIG")}
        self.environment = outside | {"DVC_SITE_CACHE_DIR": str(folder.parent / "site"), "DVC_NO_ANALYTICS": "1"}

    def start(self) -> None:
        """Make the repository, with a remote that is a folder beside it."""
        with self.entered():
            self.git("init", "-q", "-b", "main")
            repo = Repo.init()
            with repo.config.edit() as config:
                config["remote"]["shared"] = {"url": str(self.folder.parent / "remote")}
                config["core"]["remote"] = "shared"
            repo.close()
            (self.folder / "dvc.yaml").write_text(DVC_YAML)
            (self.folder / ".gitignore").write_text("/data\n/models\n/metrics/evaluation\n")

    def commit(self, message: str, measure: bool = True) -> str:
        """Measure, commit; the commit's hash."""
        with self.entered():
            if measure:
                evaluate.main()
            with Repo() as repo:
                repo.commit(force=True)
            self.git("add", "-A")
            self.git("commit", "-qm", message)
            return self.git("rev-parse", "HEAD").strip()

    def push(self) -> None:
        with self.entered(), Repo() as repo:
            repo.push(all_commits=True)

    def clone(self, folder: Path, *arguments: str) -> Reviewed:
        """A clone that has pulled nothing."""
        subprocess.run(["git", "clone", "-q", *arguments, self.folder.as_uri(), str(folder)], check=True)
        return Reviewed(folder)

    def copy(self, folder: Path) -> Reviewed:
        """A copy with cache and working tree."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Reviewed(folder)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
        result = subprocess.run(
            ["git", *identity, *arguments], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def compare(self, *arguments: str) -> int:
        """Run the command here, in this process; its exit code."""
        with self.entered() as patch:
            patch.setattr(sys, "argv", ["compare", *arguments])
            try:
                run_stage(compare.main)
            except SystemExit as exit:
                assert isinstance(exit.code, int)
                return exit.code
        return 0

    def edit(self, key: str, value: Any) -> None:
        """Change one key of params.yaml."""
        yaml, path = YAML(typ="safe"), self.folder / "params.yaml"
        values = yaml.load(path)
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block[parent]
        block[last] = value
        yaml.dump(values, path)

    def params(self) -> dict[str, Any]:
        values: dict[str, Any] = YAML(typ="safe").load(self.folder / "params.yaml")
        return values

    def cached(self) -> set[str]:
        """Paths of all objects in the cache."""
        return {str(path) for path in (self.folder / ".dvc/cache").rglob("*") if path.is_file()}

    @contextmanager
    def entered(self) -> Iterator[pytest.MonkeyPatch]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("TQDM_DISABLE", "1")
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield patch


def leaning(labels: list[str], cells: list[str], strength: float, seed: int) -> np.ndarray:
    """Odds that lean towards the labels of some rows."""
    generator = np.random.default_rng(seed)
    actual = np.array([[name in cell for name in labels] for cell in cells])
    return np.exp(generator.normal(size=actual.shape) + strength * actual)


def predict(work: Work, strength: float, seed: int, predictor: str = "adapter") -> None:
    """Write predictions of some worth for the rows of both splits."""
    for part in ("validation", "test"):
        odds = leaning(work.labels, work.split(part)[1], strength, seed)
        work.write(predictor, part, odds / (1 + odds) if work.multi_label else odds / odds.sum(axis=1, keepdims=True))


def edit_task_to_questions(folder: Path) -> None:
    """Make params.yaml ask for answers that are texts."""
    yaml, path = YAML(typ="safe"), folder / "params.yaml"
    values = yaml.load(path)
    values["task"] = {"kind": "question_answering"}
    values["infer"] = {"method": "generate", "max_new_tokens": 8}
    values["evaluate"] |= {"calibration_bins": None, "threshold": None}
    yaml.dump(values, path)


def write_questions(folder: Path, overlap: float, seed: int, rows: int = 40, **evaluate_block: Any) -> None:
    """Splits and predictions of a task whose answers are texts."""
    edit_params(folder, {"labels": ["a", "b"]}, evaluate_block)
    edit_task_to_questions(folder)
    generator = np.random.default_rng(seed)
    for part in ("validation", "test"):
        ids = [f"{part}-{row}" for row in range(rows)]
        references = [f"answer {row} is about word{row} and word{row + 1}" for row in range(rows)]
        write_split(folder, part, ids, references, None)
        for name in ("adapter", "base", "tfidf", "majority"):
            given = [
                " ".join(word if generator.random() < overlap else "else" for word in text.split())
                for text in references
            ]
            likelihoods = None if name in ("tfidf", "majority") else -generator.random(rows) / overlap
            tokens = None if likelihoods is None else np.full(rows, 9)
            path_of = folder / f"data/predictions/{name}/{part}.parquet"
            write_answers(path_of, ids, references, given, likelihoods, tokens)
    if not (folder / "models").exists():
        write_training_log(folder)
