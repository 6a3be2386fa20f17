"""Digest the code behind each expensive stage, so that a comment or a reformatting never costs GPU hours.

A digest covers the stage's module and every project module that it imports, as syntax trees without comments,
docstrings and layout. `stages.common.params` and `stages.common.schema` are left out: they check params.yaml but supply
no value (a test holds them to that), and DVC watches the values themselves.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Any

from stages.common.errors import run_stage
from stages.common.tables import write_text

EXPENSIVE_STAGES = ("finetune", "infer")
REQUIREMENTS = Path("requirements.txt")
# Libraries whose upgrade can change what an expensive stage computes.
DECISIVE_LIBRARIES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl")
LEFT_OUT = ("stages.common.params.", "stages.common.schema.")
DIGEST_FOLDER = Path("data/code")


def import_closure(module: str, root: Path) -> list[str]:
    """The module and all modules below `root`/stages that it imports, at its top or inside functions.

    Args:
        module: a dotted name such as "stages.infer".
        root: the repository's root.

    Returns:
        Sorted dotted names; packages stand for their `__init__.py`.
    """
    closure: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in closure or module_path(name, root) is None:
            continue
        closure.add(name)
        waiting += _imported_names(name, root)
    return sorted(closure)


def module_path(name: str, root: Path) -> Path | None:
    """The file of a project module; None for anything that is not one."""
    if name.partition(".")[0] != "stages":
        return None
    path = root.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def digest(module: str, root: Path) -> str:
    """SHA-256 in hexadecimal digits of what the module's closure does, the same on every Python version."""
    closure = [name for name in import_closure(module, root) if not f"{name}.".startswith(LEFT_OUT)]
    return hashlib.sha256(repr([(name, _shape(_tree(name, root))) for name in closure]).encode()).hexdigest()


def library_pins(requirements: str) -> list[str]:
    """The lines of requirements.txt that pin a decisive library, in their order."""
    return [line for line in requirements.splitlines() if line.partition("==")[0] in DECISIVE_LIBRARIES]


def _tree(name: str, root: Path) -> ast.Module:
    path = module_path(name, root)
    assert path is not None, name
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imported_names(name: str, root: Path) -> list[str]:
    names = [name.rpartition(".")[0]]  # importing a module runs its package first
    for node in ast.walk(_tree(name, root)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: relative imports are not followed"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _shape(node: Any) -> Any:
    """A syntax tree as nested tuples, without positions, docstrings and empty fields.

    Empty fields are left out because Python versions differ in which of them exist; `ast.dump` would show them.
    """
    if isinstance(node, list):
        return [_shape(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        documented = ast.get_docstring(node, clean=False) is not None
        fields["body"] = node.body[1:] if documented else node.body
    return (type(node).__name__, [(name, _shape(value)) for name, value in fields.items()])


def main() -> None:
    """Write data/code/STAGE.sha256 for each expensive stage: its digest, and the versions that it is to run with."""
    pins = library_pins(REQUIREMENTS.read_text(encoding="utf-8"))
    for stage in EXPENSIVE_STAGES:
        write_text(DIGEST_FOLDER / f"{stage}.sha256", "\n".join([digest(f"stages.{stage}", Path()), *pins]) + "\n")
    print(f"code: digests of {', '.join(EXPENSIVE_STAGES)}")


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
