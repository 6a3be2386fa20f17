"""The digests of expensive stages: what changes them and what does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stages.code import DECISIVE_LIBRARIES, digest, import_closure, library_pins

ROOT = Path(__file__).resolve().parents[1]

HELPER = '"""Help."""\n\nLIMIT = 3\n\n\ndef double(x):\n    """Twice x."""\n    return 2 * x  # why\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "stages/__init__.py": "",
        "stages/common/__init__.py": "",
        "stages/common/helper.py": HELPER,
        "stages/common/params.py": "from stages.common.schema.task import A\n",
        "stages/common/schema/__init__.py": "",
        "stages/common/schema/task.py": "A = 1\n",
        "stages/common/other.py": "B = 1\n",
        "stages/train.py": "from stages.common.helper import double\ndef main():\n    import stages.common.params\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_closure_holds_packages_and_imports_inside_functions(project: Path) -> None:
    assert import_closure("stages.train", project) == [
        "stages",
        "stages.common",
        "stages.common.helper",
        "stages.common.params",
        "stages.common.schema",
        "stages.common.schema.task",
        "stages.train",
    ]


@pytest.mark.parametrize(
    "edited",
    [
        HELPER.replace("  # why", "  # another reason"),
        HELPER.replace('"""Twice x."""', '"""Twice x, whatever it is."""'),
        HELPER.replace('"""Help."""\n', ""),
        HELPER.replace("2 * x", "(2\n        * x)"),
        "\n\n" + HELPER,
    ],
    ids=["comment", "docstring", "no module docstring", "layout", "blank lines"],
)
def test_comments_docstrings_and_layout_change_nothing(project: Path, edited: str) -> None:
    before = digest("stages.train", project)
    (project / "stages/common/helper.py").write_text(edited)
    assert digest("stages.train", project) == before


@pytest.mark.parametrize("edited", [HELPER.replace("2 * x", "3 * x"), HELPER.replace("LIMIT = 3", "LIMIT = 3.0")])
def test_a_real_edit_of_an_imported_module_changes_the_digest(project: Path, edited: str) -> None:
    before = digest("stages.train", project)
    (project / "stages/common/helper.py").write_text(edited)
    assert digest("stages.train", project) != before


def test_a_string_that_is_no_docstring_counts(project: Path) -> None:
    before = digest("stages.train", project)
    (project / "stages/common/helper.py").write_text(HELPER + 'NAME = "a"\n')
    named_a = digest("stages.train", project)
    (project / "stages/common/helper.py").write_text(HELPER + 'NAME = "b"\n')
    assert len({before, named_a, digest("stages.train", project)}) == 3


@pytest.mark.parametrize("name", ["stages/common/other.py", "stages/common/params.py", "stages/common/schema/task.py"])
def test_modules_outside_the_closure_and_the_schema_of_params_do_not_count(project: Path, name: str) -> None:
    before = digest("stages.train", project)
    (project / name).write_text("C = 2\n")
    assert digest("stages.train", project) == before


def test_pins_of_decisive_libraries_stand_beside_the_digest() -> None:
    requirements = "# torch\n--only-binary=:all:\ntorch==2.13.0\ntqdm==4.70.1\ntransformers==5.23.0\n"
    assert library_pins(requirements) == ["torch==2.13.0", "transformers==5.23.0"]
    pinned = library_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert [line.partition("==")[0] for line in sorted(pinned)] == sorted(DECISIVE_LIBRARIES)


def test_the_digest_is_the_same_on_every_python_version(project: Path) -> None:
    # Written down on 3.11; a fixed value is what makes another interpreter in CI notice a difference.
    assert sys.version_info >= (3, 11)
    expected = "f1240b5bae868fcc25d9deefef3a6fe3ba0c0cea8286bf7a76b6f648358bb6ae"
    assert digest("stages.train", project) == expected
