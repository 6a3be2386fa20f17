"""Whether an adapter says that it was made of what its commit holds: base, data, code and parameters."""

from __future__ import annotations

from filecmp import cmp
from pathlib import Path
from typing import Any

from review.differences import changed_parameters
from review.recompute import copy_into, run_in
from stages.common.base import BASE_PIN, TOKENIZER_FOLDER, file_sha256
from stages.common.tables import read_json, row_count, table_metadata

ADAPTER = Path("models/adapter")
PARTS = {part: Path(f"data/splits/{part}.parquet") for part in ("train", "validation")}
CODE_DIGEST = Path("data/code/finetune.sha256")
# Characters of a value that are shown.
MOST_SHOWN = 80


def misfits(parameters: dict[str, Any]) -> list[str]:
    """Where what the adapter carries is not what the commit holds; the current folder is the commit's.

    Args:
        parameters: blocks of params.yaml with which dvc.lock says that the stages ran.
    """
    said, pin = read_provenance(), read_json(BASE_PIN)
    expected = {
        # Of the source, an adapter made from a folder does not say where that lies.
        "base": {"files": pin["files"], "commit": pin["commit"]},
        "data": {name: {"sha256": file_sha256(path), "rows": row_count(path)} for name, path in PARTS.items()},
        "code": CODE_DIGEST.read_text(encoding="utf-8").split()[0],
        "parameters": {name: parameters.get(name) for name in ("finetune", "task")},
    }
    found = {name: said[name] for name in expected if name in said}
    if isinstance(found.get("base"), dict):
        found["base"] = {name: value for name, value in found["base"].items() if name != "source"}
    texts = [
        f"{ADAPTER}/provenance.json: {entry['key']}: {_shown(entry, 'after')}, in the commit {_shown(entry, 'before')}"
        for entry in changed_parameters(expected, found)
    ]
    return texts + _other_companions(said)


def _other_companions(said: dict[str, Any]) -> list[str]:
    """Files beside the weights that are not those of the commit."""
    tokenizer = sorted(path.name for path in TOKENIZER_FOLDER.iterdir())
    are_same = {
        "base.json": read_json(ADAPTER / "base.json") == said.get("base"),
        "prompt.json": read_json(ADAPTER / "prompt.json") == table_metadata(PARTS["train"], "prompt_format"),
    } | {name: _same(TOKENIZER_FOLDER / name, ADAPTER / name) for name in tokenizer}
    made_of = {"base.json": f"{ADAPTER}/provenance.json", "prompt.json": PARTS["train"]}
    return [
        f"{ADAPTER}/{name} is not that of {made_of.get(name, TOKENIZER_FOLDER)}"
        for name, is_same in are_same.items()
        if not is_same
    ]


def read_provenance() -> dict[str, Any]:
    """What the adapter says of its making; nothing where it says nothing that can be read."""
    said = read_json(ADAPTER / "provenance.json")
    return said if isinstance(said, dict) else {}


def other_digests(folder: Path) -> list[str]:
    """Digests in data/code/ that are not those of the commit's code; the current folder is the commit's.

    Args:
        folder: an empty one.
    """
    copy_into(folder, [Path("stages"), Path("requirements.txt")])
    run_in(folder, "code")
    paths = [path.relative_to(folder) for path in sorted((folder / CODE_DIGEST).parent.iterdir())]
    return [f"{path} is not the digest of the commit's code" for path in paths if not _same(folder / path, path)]


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and cmp(one, other, shallow=False)


def _shown(entry: dict[str, Any], side: str) -> str:
    text = repr(entry[side]) if side in entry else "absent"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
