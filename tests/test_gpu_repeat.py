"""With DETERMINISTIC=1 two runs on one GPU end in the same bytes; run with `pytest -m gpu -s` where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import OURS
from stages.common.base import BASE_FOLDER, BASE_PIN, TOKENIZER_FOLDER
from stages.finetune import ADAPTER, CODE_DIGEST, PARTS
from stages.infer import PREDICTIONS_FOLDER
from tests.stored import files_in
from tests.workplace import ROOT, Workplace, make_workplace

# What keeps processes of their own from using the GPU in other tests.
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
PATHS = {
    "recorded": {"COMPILE_LAYERS": "0"},
    "compiled": {"COMPILE_LAYERS": "1"},
    "padded NF4": {"PACK_ROWS": "0", "DENSE_BASE": "0"},
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project up to its splits, whose rows are longer than one block of FlashAttention's keys."""
    place = make_workplace(tmp_path_factory.mktemp("repeat") / "project")
    place.set("format_prompts.template", "Reviews:" + " {{ text }}" * 12 + "\nOpinion:")
    place.set("format_prompts.max_length_tokens", 512)
    place.set("base_model.path", str(place.folder / "base"))
    place.set("finetune.max_steps", 40)
    place.set("finetune.evaluate_every_steps", 20)
    place.run_up_to_splits()
    return place


@pytest.fixture(scope="module")
def default_recipe(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """What `finetune` reads of the committed recipe, as far as it is here."""
    place = Workplace(tmp_path_factory.mktemp("default") / "project")
    needed = [Path("params.yaml"), BASE_PIN, TOKENIZER_FOLDER, CODE_DIGEST, Path("data/splits")]
    if not all((ROOT / path).exists() for path in (*needed, *PARTS.values(), BASE_FOLDER)):
        pytest.skip("splits and base are not here: `dvc repro` makes them")
    for path in needed:
        (place.folder / path).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile
        copy(ROOT / path, place.folder / path)
    (place.folder / BASE_FOLDER).symlink_to(ROOT / BASE_FOLDER)
    return place


def results_of_two(place: Workplace, folder: Path, **environment: str) -> list[dict[str, bytes]]:
    """Every file of the adapter and of its predictions, of two runs at the same time in processes of their own."""
    places = [Workplace(folder / name) for name in ("first", "second")]
    for one in places:
        shutil.copytree(place.folder, one.folder, symlinks=True)
    for stage in ("stages.finetune", "stages.infer"):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", stage], cwd=one.folder, env=one.environment(**GPU, **environment), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for one in places
        ]  # fmt: skip
        said = [process.communicate()[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        print(said[0])
    folders = (ADAPTER, PREDICTIONS_FOLDER)
    return [{f"{at}/{name}": content for at in folders for name, content in files_in(one.folder / at).items()}
            for one in places]  # fmt: skip


def differing(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if first[name] != second[name]]


@pytest.mark.parametrize("paths", PATHS)
def test_two_runs_in_two_processes_give_the_same_bytes(prepared: Workplace, tmp_path: Path, paths: str) -> None:
    first, second = results_of_two(prepared, tmp_path, DETERMINISTIC="1", **PATHS[paths])
    assert differing(first, second) == []


def test_two_runs_of_the_default_recipe_give_the_same_bytes(default_recipe: Workplace, tmp_path: Path) -> None:
    first, second = results_of_two(default_recipe, tmp_path, DETERMINISTIC="1")
    assert differing(first, second) == []


@pytest.mark.parametrize("shape", ["smollm2-135m", "llama-3.2-1b"])
def test_what_it_costs_is_printed(shape: str, tmp_path: Path) -> None:
    rates = {}
    for value in ("0", "1"):
        started, results = time.monotonic(), tmp_path / f"{value}.json"
        arguments = ["--shapes", shape, "--systems", OURS, "--steps", "24", "--warmup-steps", "10"]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.training", *arguments, "--json", str(results)],
            cwd=ROOT, env=os.environ | GPU | {"DETERMINISTIC": value}, check=True,
        )  # fmt: skip
        rates[value] = json.loads(results.read_text(encoding="utf-8"))["examples_per_second"]
        print(f"DETERMINISTIC={value}, {shape}: {rates[value]:,.0f} examples/s, {time.monotonic() - started:,.0f} s")
    print(f"{shape}: DETERMINISTIC=1 takes {rates['0'] / rates['1']:.2f} times as long")
    assert rates["1"] > 0.2 * rates["0"], "another algorithm, not the slow path"
