"""The workflows' files: linters that refuse what is broken, least permissions, and packages that are really needed."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# What the workflows run, and what that runs in processes of their own.
REVIEWING = (
    "review.check",
    "review.recompute",
    "review.pull_request",
    "review.compare",
    "review.plots",
    "stages.evaluate",
    "stages.report",
)


def lint(folder: Path) -> tuple[bool, str]:
    """Run the commands of `make lint` that look at YAML, in a folder; whether all pass, and what they say."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^\t@\$\(BIN\)/((?:zizmor|check-jsonschema) .*)$", makefile, flags=re.MULTILINE)
    assert len(commands) == 3
    said, passed = "", True
    for command in commands:
        result = subprocess.run(f"{BIN}/{command}", cwd=folder, shell=True, capture_output=True, text=True, check=False)
        passed &= result.returncode == 0
        said += result.stdout + result.stderr
    return passed, said


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    shutil.copy(ROOT / ".gitlab-ci.yml", tmp_path)
    return tmp_path


def test_the_linters_have_nothing_to_say(copy: Path) -> None:
    passed, said = lint(copy)
    assert passed, said


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (".github/workflows/review.yml", "timeout-minutes: 30", "timeout-minute: 30", "timeout-minute"),
        (".github/workflows/review.yml", "    runs-on: ubuntu-24.04\n", "", "runs-on"),
        (".github/workflows/review.yml", "origin/$GITHUB_BASE_REF", "${{ github.head_ref }}", "template-injection"),
        (".github/workflows/review.yml", "pull_request:\n", "pull_request_target:\n", "dangerous-triggers"),
        (".github/workflows/review.yml", "          persist-credentials: false\n", "", "artipacked"),
        (".github/workflows/review.yml", "permissions: {}", "permissions: write-all", "excessive-permissions"),
        (".github/workflows/ci.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1", "@v7", "unpinned-uses"),
        (".gitlab-ci.yml", "expire_in: 30 days\n", "expire_on: 30 days\n", "expire_on"),
        (".gitlab-ci.yml", "stages: [review, comment]", "stages: {review: comment}", "stages"),
        (".gitlab-ci.yml", "  script:\n    - .ci/run", "  script: [[.ci/run", "parse"),
    ],
)  # fmt: skip
def test_the_linters_refuse_a_broken_workflow(copy: Path, file: str, old: str, new: str, expected: str) -> None:
    text = (copy / file).read_text(encoding="utf-8")
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    passed, said = lint(copy)
    assert not passed
    assert expected in said.lower()


def jobs() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in WORKFLOWS:
        workflow = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {}, path
        found += [(f"{path.name}:{name}", job) for name, job in workflow["jobs"].items()]
    return found


def test_every_action_is_pinned_by_commit_with_its_version_beside_it() -> None:
    uses = [line for path in WORKFLOWS for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(uses) >= 8
    for line in uses:
        assert re.search(r"uses: actions/[a-z-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line
    pins = {(match[1], match[2]) for line in uses if (match := re.search(r"actions/([a-z-]+)@(\w+)", line))}
    assert len(pins) == len({name for name, _ in pins}), "one action at two commits"


def test_what_may_write_checks_out_the_base_alone_and_runs_nothing_but_the_comment() -> None:
    writing = {name: job for name, job in jobs() if "write" in job["permissions"].values()}
    assert writing.keys() == {"review.yml:comment", "comment-on-fork.yml:comment"}
    for name, job in writing.items():
        assert job["permissions"].keys() <= {"actions", "contents", "pull-requests"}, name
        assert {key for key, value in job["permissions"].items() if value == "write"} == {"pull-requests"}
        [checkout] = [step for step in job["steps"] if "checkout" in step.get("uses", "")]
        assert checkout["with"]["ref"] in (
            "${{ github.event.pull_request.base.sha }}", "${{ github.event.repository.default_branch }}",
        )  # fmt: skip
        [command] = [step["run"] for step in job["steps"] if "run" in step]
        assert command.startswith("python3 -m review.comment ")
        assert "secrets." not in str(job)


def test_every_job_has_a_time_limit_and_no_command_has_an_expression() -> None:
    for name, job in jobs():
        assert job["timeout-minutes"] <= 90, name
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), name


@pytest.mark.parametrize(
    ("conclusion", "of_fork", "runs"),
    [
        ("success", True, True),
        ("failure", True, True),
        ("success", False, False),
        # Of a run that was stopped, or waits for approval, there is no artifact to post.
        ("cancelled", True, False),
        ("action_required", True, False),
        ("timed_out", True, False),
        ("skipped", True, False),
        ("startup_failure", True, False),
        ("stale", True, False),
        ("neutral", True, False),
    ],
)
def test_a_forks_run_is_commented_on_where_it_came_to_an_end(conclusion: str, of_fork: bool, runs: bool) -> None:
    condition = dict(jobs())["comment-on-fork.yml:comment"]["if"]
    # GitHub's expression as Python's; what either does not know fails.
    expression = condition.strip().removeprefix("${{").removesuffix("}}").strip().replace("&&", "and")
    values = {
        "github.event.workflow_run.event": "pull_request",
        "github.event.workflow_run.conclusion": conclusion,
        "github.event.workflow_run.head_repository.full_name": "fork/name" if of_fork else "owner/name",
        "github.repository": "owner/name",
    }
    for name in sorted(values, key=len, reverse=True):
        expression = expression.replace(name, repr(values[name]))
    functions = {"contains": lambda items, item: item in items, "fromJSON": json.loads}
    assert eval(expression, {"__builtins__": {}} | functions) is runs


def requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}


def normal(package: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def test_a_package_has_the_same_pin_in_all_requirements() -> None:
    everything = {name: requirements(name) for name in ("requirements.txt", "requirements-dev.txt")}
    for package, version in requirements("requirements-review.txt").items():
        for name, pins in everything.items():
            assert pins.get(package, version) == version, f"{package} in {name}"
    assert requirements("requirements-review.txt").keys() - everything["requirements.txt"].keys() <= {"dvc-s3"}
    for option in ("--only-binary=:all:", "--no-binary=antlr4-python3-runtime"):
        assert option in (ROOT / "requirements-review.txt").read_text(encoding="utf-8")


def imported(modules: tuple[str, ...]) -> set[str]:
    """Top-level names outside of the project and the standard library that the modules' closure imports."""
    waiting, seen, found = list(modules), set(), set()
    while waiting:
        module = waiting.pop()
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += names
            found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"stages", "review", "preflight", "serving"}


def test_what_reviewing_imports_is_in_its_requirements_and_nothing_of_training_is() -> None:
    distributions = packages_distributions()
    needed = {normal(distributions[name][0]) for name in imported(REVIEWING)}
    listed = requirements("requirements-review.txt").keys()
    # The first two come with DVC and scikit-learn, at the version that they want; DVC itself imports the third.
    assert needed - {"dvc-data", "threadpoolctl"} == listed - {"dvc-s3"}
    assert not {"torch", "transformers", "trl", "peft", "bitsandbytes"} & listed


def test_what_posts_needs_no_package() -> None:
    assert imported(("review.comment",)) == set()
