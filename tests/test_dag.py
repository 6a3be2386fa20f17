"""dvc.yaml says what the code really does: stages, code dependencies, parameters."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks.stages import write_model_outputs
from stages.code import EXPENSIVE_STAGES, LEFT_OUT, import_closure, module_path
from tests.workplace import Workplace, make_workplace

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# Two stages of one module.
MODULES = {name: "infer" if name == "infer_base" else name for name in STAGES}
CHEAP = sorted(name for name in STAGES if MODULES[name] not in EXPENSIVE_STAGES and name != "code")
# Each takes half a second to some ten seconds to import.
SLOW_LIBRARIES = {"torch", "transformers", "datasets", "trl", "peft", "bitsandbytes", "sklearn", "scipy"}


def commands(stage: str) -> list[str]:
    command = STAGES[stage]["cmd"]
    return command if isinstance(command, list) else [command]


def test_every_module_is_a_stage_and_every_stage_a_module() -> None:
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert modules == set(MODULES.values())
    for stage, module in MODULES.items():
        assert commands(stage)[-1].split()[:3] == ["python", "-m", f"stages.{module}"]


@pytest.mark.parametrize("stage", CHEAP)
def test_a_cheap_stage_depends_on_the_modules_it_imports_and_on_no_other(stage: str) -> None:
    listed = {path for path in STAGES[stage]["deps"] if path.endswith(".py")}
    closure = import_closure(f"stages.{stage}", ROOT)
    paths = {str(path.relative_to(ROOT)) for name in closure if (path := module_path(name, ROOT)) is not None}
    assert listed == {path for path in paths if not path.endswith("__init__.py")}


@pytest.mark.parametrize("stage", [name for name in STAGES if MODULES[name] in EXPENSIVE_STAGES])
def test_an_expensive_stage_depends_on_the_digest_of_its_code(stage: str) -> None:
    assert f"data/code/{MODULES[stage]}.sha256" in STAGES[stage]["deps"]
    assert not [path for path in STAGES[stage]["deps"] if path.endswith(".py")]


def test_packages_hold_no_code_that_a_dependency_could_miss() -> None:
    for path in (ROOT / "stages").rglob("__init__.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(statements) == 1
        assert isinstance(statements[0], ast.Expr)


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "code"])
def test_a_stage_loads_exactly_the_blocks_of_params_that_dvc_watches(stage: str) -> None:
    module = module_path(f"stages.{MODULES[stage]}", ROOT)
    assert module is not None
    calls = [
        node
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load_params"
    ]
    loaded = {argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)}
    assert loaded == set(STAGES[stage].get("params", []))


def test_the_schema_of_params_is_left_out_of_digests_because_it_supplies_no_value() -> None:
    # tests/test_params.py holds it to that: no defaults, and loading changes no value.
    assert LEFT_OUT == ("stages.common.params.", "stages.common.schema.")
    for stage in EXPENSIVE_STAGES:
        closure = [f"{name}." for name in import_closure(f"stages.{stage}", ROOT)]
        assert all(any(name.startswith(left_out) for name in closure) for left_out in LEFT_OUT)


def test_no_stage_writes_into_another_stages_output() -> None:
    outputs = [
        next(iter(output)) if isinstance(output, dict) else output
        for stage in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for output in stage.get(kind, [])
    ]
    assert len(outputs) == len(set(outputs))


def test_expensive_stages_have_only_cached_outputs_so_that_any_clone_can_restore_them() -> None:
    for stage in STAGES:
        if MODULES[stage] in EXPENSIVE_STAGES:
            assert all(isinstance(output, str) for output in STAGES[stage]["outs"])
            assert "metrics" not in STAGES[stage]
            assert "plots" not in STAGES[stage]


def modules_after(place: Workplace, stages: Sequence[str]) -> list[str]:
    """Run stages in one process; which of the slow libraries it has imported after each, beside the stage's name."""
    program = (
        "import importlib, sys\n"
        f"for name in {list(stages)}:\n"
        "    importlib.import_module('stages.' + name).main()\n"
        f"    print('after', name, *sorted({SLOW_LIBRARIES} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place.folder, env=place.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("after ")]


def test_cheap_stages_run_without_torch_and_evaluate_without_scikit_learn_too(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    before_training = ["code", "base_model", "ingest", "format_prompts", "split", "baseline"]
    found = modules_after(place, before_training)
    assert found[:-2] == [f"after {stage}" for stage in before_training[:-2]]
    # The split draws with scikit-learn, and that is what the baseline is.
    assert found[-2:] == [f"after {stage} scipy sklearn" for stage in before_training[-2:]]
    write_model_outputs(tmp_path)
    assert modules_after(place, ["evaluate", "report"]) == ["after evaluate", "after report"]
