"""The folder of a merged model: written whole or not at all, with all that its adapter's folder says beside weights."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from serving.common.adapter import DECISION, Adapter, is_ours
from stages.base_model import TOKENIZER_FILES
from stages.common.base import file_sha256
from stages.common.errors import UserError, listing
from stages.common.tables import read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIED_FILES = (*TOKENIZER_FILES, "prompt.json", "base.json")
SPARE_BYTES = 100_000_000


def check_destination(folder: Path) -> None:
    """Refuse to replace anything but an earlier export.

    Raises:
        UserError: there is something else, or it is where a disk is mounted.
    """
    if os.path.ismount(folder):
        raise mount_point(folder)
    if folder.is_dir() and ((folder / "parity.json").is_file() or not any(folder.iterdir())):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--output: {folder} holds something that is no merged model. Name another folder, or move it.")


def mount_point(folder: Path) -> UserError:
    """What is said of a folder that no other can take the place of."""
    return UserError(f"--output: a disk is mounted at {folder}, which cannot be replaced. Name a folder inside it.")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what would fill the disk.

    Args:
        folder: what is to be written, beside which it is made first.
        needed_bytes: what it takes.

    Raises:
        UserError: less than that and a little more is free.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed_bytes + SPARE_BYTES > free:
        left = sorted(path.name for path in folder.parent.glob(f".{folder.name.removesuffix('.gguf')}.*"))
        killed = f" {listing(left)} is left of killed exports, unless one is at work: delete it." if left else ""
        raise UserError(
            f"{folder}: takes some {needed_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there (an export "
            "that is there already stays until the new one is complete). Free some space, or name another disk with "
            f"--output.{killed}"
        )


def parameter_count(base: Path) -> int:
    """How many numbers the safetensors files in a folder hold."""
    from safetensors import safe_open

    count = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block ends, and is removed when the block fails."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner can read, and safetensors such files.
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
        if not folder.exists():
            temporary.rename(folder)
            return
        before = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")) / "before"
        try:
            folder.rename(before)
        except OSError as error:
            before.parent.rmdir()
            if error.errno == errno.EBUSY:
                raise mount_point(folder) from None
            raise
        temporary.rename(folder)
        shutil.rmtree(before.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_merged(model: PreTrainedModel, adapter: Adapter, decision: Path | None, folder: Path) -> None:
    """Write weights, tokenizer, prompt format, decision rule, provenance and model card into an empty folder.

    Args:
        model: the merged model, its generation settings in place.
        adapter: what was merged into it.
        decision: the file with the adapter's rule, where its user named one.
        folder: exists and is empty.
    """
    model.save_pretrained(folder)
    for name in COPIED_FILES:
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, folder / name)
    if adapter.rule is not None:
        assert decision is not None or is_ours(adapter.folder), "no other folder has a rule"
        shutil.copyfile(decision or DECISION, folder / "decision.json")
    provenance = adapter.folder / "provenance.json"
    dtype = str(model.dtype).removeprefix("torch.")
    merged = {"dtype": dtype, "adapter_sha256": weights_sha256(adapter.folder)}
    write_json(folder / "provenance.json", (read_json(provenance) if provenance.is_file() else {}) | {"merged": merged})
    write_text(folder / "README.md", str(merged_card(adapter, dtype)) + "\n")


def weights_sha256(folder: Path) -> str:
    """What tells an adapter from all others: the SHA-256 of its weights."""
    return file_sha256(folder / "adapter_model.safetensors")


def base_name(base_pin: dict[str, Any]) -> str:
    """What a base model is called, in letters that file names can have.

    Args:
        base_pin: what base.json holds.
    """
    source = base_pin["source"]
    match source["source"]:
        case "hub":
            name = source["repo_id"]
        case "package":
            # SmolLM2-135M-Instruct.Q4_1.gguf was dequantised: what it was packed in says nothing any more.
            name = source["member"][-1].removesuffix(".gguf").partition(".Q")[0]
        case _:
            name = source["path"]
    return PurePosixPath(name).name or "model"


def merged_card(adapter: Adapter, dtype: str) -> ModelCard:
    """What the folder holds and how it is used."""
    from stages.common.training.adapter_folder import KINDS

    base_pin = read_json(adapter.folder / "base.json")
    name, kind = base_name(base_pin), KINDS[adapter.kind]
    hub = base_pin["source"]["repo_id"] if base_pin["source"]["source"] == "hub" else None
    metadata = ModelCardData(
        base_model=hub, library_name="transformers", pipeline_tag=kind.pipeline_tag, tags=["qlora", "merged", "dvc"]
    )
    labels = ", ".join(f"`{label}`" for label in adapter.prompt_format.labels)
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# {name}: {kind.title}, merged

{name} with a QLoRA adapter that {kind.purpose.format(labels=labels)}, merged into the base's NF4 weights as training
saw them, dequantised, and rounded once to {dtype}. Neither bitsandbytes nor PEFT is needed:

```python
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

Build the prompt from `prompt.json` ({kind.prompt_parts}, {adapter.prompt_format.max_length_tokens} tokens at most), and
{kind.use}
`python -m serving.predict --adapter FOLDER` in the repository that made this does both.

`parity.json` compares it with the adapter on its base in NF4, row by row; `provenance.json` has the hashes of adapter,
base, data and code{"; `decision.json` has the adapter's decision rule" if adapter.rule is not None else ""}.
""")
