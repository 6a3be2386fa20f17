"""Convert models/merged for llama.cpp and Ollama: `python -m serving.gguf --type q8_0` writes into models/gguf.

The file is loaded by llama.cpp and compared with the adapter on the test split first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.common.adapter import ADAPTER, Adapter, read_adapter
from serving.export.rows import TEST_SPLIT, TestRows, read_test_rows
from serving.merge import MERGED, adapter_answers, read_mergeable
from stages.common.base import file_sha256
from stages.common.errors import UserError, run_stage
from stages.common.tables import read_json, write_json, write_text

if TYPE_CHECKING:
    from serving.export.llama_cpp import LlamaModel

GGUF = Path("models/gguf")
# The least share of equal answers; of q4_k_m they are reported.
LEAST_EQUAL = {"f16": 0.99, "q8_0": 0.98, "q4_k_m": 0.0}


def export(
    adapter: Adapter, merged: Adapter, rows: TestRows, file_type: str, path: Path, made_from: dict[str, Any]
) -> dict[str, Any]:
    """Write a GGUF file with its report and Modelfile, if it answers as the adapter does.

    Args:
        adapter: what it is compared with.
        merged: what is converted.
        rows: what both are asked.
        file_type: a key of LEAST_EQUAL.
        path: the file to write.
        made_from: what the report says of its origin.

    Returns:
        The report.

    Raises:
        UserError: converter or quantiser refuse, or the answers differ.
    """
    from serving.export.llama_cpp import LlamaModel, tensor_types
    from serving.export.parity import compare, require_parity
    from serving.predictor import rule_of

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        made = make_file(merged.folder, file_type, path, Path(folder), made_from)
        # The adapter last: asking it takes longest, and whatever else can fail has not.
        ours = adapter_answers(adapter, rows)
        model = LlamaModel(made)
        report = compare(adapter, rule_of(merged), rows, ours, model.answers(adapter, rows))
        report["equal"]["tokens of the prompt as llama.cpp cuts it"] = equal_tokens(model, rows)
        remedy = "Try another --type, or serve models/merged itself."
        require_parity(report, LEAST_EQUAL[file_type], f"{merged.folder} as {file_type}", remedy)
        report = {"made_from": made_from, "sha256": file_sha256(made), "bytes": made.stat().st_size} | report
        report |= {"least_equal": LEAST_EQUAL[file_type], "tensors": tensor_types(made)}
        report["no_modelfile"] = write_modelfile(path, merged, rows, model)
        write_json(report_path(path), report)
        made.replace(path)
    return report


def make_file(merged: Path, file_type: str, path: Path, folder: Path, made_from: dict[str, Any]) -> Path:
    """Convert, and quantise where that is asked for; an f16 file that is there already is not made again.

    Args:
        merged: the folder that is converted.
        file_type: a key of LEAST_EQUAL.
        path: where the file will be put.
        folder: where it is made.
        made_from: what a file that is there has to be made from.
    """
    from serving.export.converter import convert
    from serving.export.llama_cpp import quantise

    name = path.name.removesuffix(f".{file_type}.gguf")
    full = path.with_name(f"{name}.f16.gguf")
    if not is_made(full, made_from):
        full = folder / full.name
        convert(merged, full, name)
    if file_type == "f16":
        return full
    quantise(full, folder / path.name, file_type)
    return folder / path.name


def equal_tokens(model: LlamaModel, rows: TestRows) -> float:
    """The share of prompts of which llama.cpp makes the tokens that training saw.

    The gate asks it for the training's own tokens. Whoever sends texts, as to Ollama, gets llama.cpp's: where these are
    others, so is what the gate has shown. Hence they are held to the same bound.
    """
    pairs = zip(rows.prompts, rows.prompt_ids, strict=True)
    return sum(model.token_ids(prompt) == ids for prompt, ids in pairs) / len(rows.prompts)


def write_modelfile(path: Path, merged: Adapter, rows: TestRows, model: LlamaModel) -> str | None:
    """Write an Ollama Modelfile beside a GGUF file, or say why there can be none, removing an earlier one."""
    from serving.export.modelfile import NoModelfileError, modelfile
    from stages.common.prompting.tokenizer import load_prompt_tokenizer

    tokenizer, target = load_prompt_tokenizer(merged.folder), path.with_suffix(".Modelfile")
    leading_bos = tokenizer.special_tokens.get("bos_token", "") if model.adds_bos else ""
    texts = [] if merged.kind == "chat" else rows.texts
    try:
        write_text(target, modelfile(path.name, merged.prompt_format, tokenizer, leading_bos, texts))
    except NoModelfileError as error:
        target.unlink(missing_ok=True)
        return str(error)
    return None


def report_path(path: Path) -> Path:
    """Where what is known of a GGUF file is written."""
    return path.with_suffix(".json")


def is_made(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether a file is there, as it was written, and made from just this."""
    if not path.is_file() or not report_path(path).is_file():
        return False
    report = read_json(report_path(path))
    return report["made_from"] == made_from and report["sha256"] == file_sha256(path)


def origin(merged: Path, rows: TestRows) -> dict[str, Any]:
    """All that decides what the export is, and what it was compared on."""
    import importlib.metadata

    from serving.export.converter import PACKAGE

    files = sorted([*merged.glob("*.safetensors"), *merged.glob("*.json"), *merged.glob("*.jinja")])
    return {
        "merged": {path.name: file_sha256(path) for path in files},
        "rows_sha256": rows.sha256,
        "converter": PACKAGE.requirement,
        "llama_cpp": f"cyllama=={importlib.metadata.version('cyllama')}",
    }


def read_merged(folder: Path, adapter: Adapter) -> Adapter:
    """The merged model, which has to be of this adapter.

    Raises:
        UserError: there is none, or it is another adapter's.
    """
    from serving.export.folder import weights_sha256

    if not (folder / "parity.json").is_file():
        raise UserError(f"{folder}: there is no merged model. `python -m serving.merge` makes it; run that first.")
    merged = read_adapter(folder)
    made_of = read_json(folder / "provenance.json")["merged"]["adapter_sha256"]
    if made_of != weights_sha256(adapter.folder) or merged.prompt_format != adapter.prompt_format:
        raise UserError(f"{folder}: was made of another adapter than {adapter.folder}. Run `python -m serving.merge`.")
    return merged


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m serving.gguf", description=__doc__, allow_abbrev=False)
    parser.add_argument("--type", choices=LEAST_EQUAL, default="q8_0", help="of the weights, default q8_0")
    parser.add_argument("--model", metavar="FOLDER", type=Path, default=MERGED, help=f"default {MERGED}")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=GGUF, help=f"default {GGUF}")
    parser.add_argument(
        "--adapter", metavar="FOLDER", type=Path, default=ADAPTER, help=f"compared with, default {ADAPTER}"
    )
    parser.add_argument(
        "--rows", metavar="FILE", type=Path, default=TEST_SPLIT, help=f"compared on, default {TEST_SPLIT}"
    )
    return parser.parse_args()


def main() -> None:
    """Write the GGUF file and say how it compares with the adapter."""
    options = arguments()
    adapter = read_mergeable(options.adapter, None)
    merged = read_merged(options.model, adapter)
    rows = read_test_rows(options.rows, adapter)
    from serving.export.folder import base_name, check_space
    from serving.export.llama_cpp import binding
    from serving.export.parity import describe

    binding()
    name = f"{base_name(read_json(merged.folder / 'base.json'))}-{merged.kind.replace('_', '-')}"
    path = options.output / f"{name}.{options.type}.gguf"
    made_from = origin(merged.folder, rows)
    if is_made(path, made_from):
        print(f"gguf: {path}: is made from this very {options.model} already")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    weights = sum(file.stat().st_size for file in merged.folder.glob("*.safetensors"))
    # The f16 file and what it is quantised to.
    check_space(path, weights if options.type == "f16" else 2 * weights)
    print(f"gguf: {options.model} to {options.type}, compared on {len(rows.prompt_ids):,} rows", flush=True)
    report = export(adapter, merged, rows, options.type, path, made_from)
    tensors = ", ".join(f"{count} {kind}" for kind, count in report["tensors"].items())
    print(f"gguf: {path}, {report['bytes'] / 1e6:,.1f} MB (tensors: {tensors}): {describe(report)}")
    if report["no_modelfile"]:
        print(f"warning: no Modelfile for Ollama: {report['no_modelfile']}", file=sys.stderr)


if __name__ == "__main__":
    run_stage(main)
