"""Merge an adapter into its base model: `python -m serving.merge` writes models/merged, a model that needs no adapter.

It is compared with the adapter on the test split first, and exported only where both give the same answers.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.common.adapter import ADAPTER, Adapter, pin_base, read_adapter
from serving.export.rows import TEST_SPLIT, TestRows, read_test_rows
from stages.common.errors import UserError, run_stage

if TYPE_CHECKING:
    from serving.export.parity import Answers

MERGED = Path("models/merged")
DTYPES = ("bfloat16", "float16")
LEAST_EQUAL = 0.995


def merge(adapter: Adapter, rows: TestRows, dtype: str, decision: Path | None, output: Path) -> dict[str, Any]:
    """Write the merged model, if it answers as the adapter does.

    Args:
        adapter: what is merged.
        rows: what both are asked.
        dtype: one of DTYPES.
        decision: the file with the adapter's rule, where its user named one.
        output: the folder to write, whole or not at all; of an earlier export it takes the place.

    Returns:
        How the two compare.

    Raises:
        UserError: adapter or base cannot be had or merged, the disk is too small, or the answers differ.
    """
    import torch

    from serving.common.merged import load_merged
    from serving.export.folder import check_destination, check_space, parameter_count, whole_folder, write_merged
    from serving.export.merging import greedy_generation, merge_adapter
    from serving.export.parity import compare, require_parity
    from serving.export.torch_answers import torch_answers
    from serving.predictor import rule_of
    from stages.common.base import ensure_base
    from stages.common.prompting.tokenizer import load_prompt_tokenizer
    from stages.common.tables import write_json
    from stages.common.training.adapter_folder import hardware, library_versions

    # A link stays one: what it leads to is replaced.
    output = Path(os.path.realpath(output))
    check_destination(output)
    check_space(output, parameter_count(ensure_base()) * torch.finfo(getattr(torch, dtype)).bits // 8)
    with whole_folder(output) as folder:
        model = merge_adapter(adapter.folder, getattr(torch, dtype))
        model.generation_config = greedy_generation(adapter.prompt_format, load_prompt_tokenizer(adapter.folder))
        write_merged(model, adapter, decision, folder)
        del model
        free_memory()
        # The adapter last, with no other model in memory: asking it takes longest, and merging can be refused.
        ours = adapter_answers(adapter, rows)
        # As it is on the disk, by the way that anybody loads it.
        model = load_merged(folder, torch.float32)
        report = compare(adapter, rule_of(adapter), rows, ours, torch_answers(model, adapter, rows, "the merged model"))
        remedy = "Merge with the other --dtype, or serve the adapter itself."
        require_parity(report, LEAST_EQUAL, f"{adapter.folder} merged in {dtype}", remedy)
        computed = {"hardware": hardware(model.device, model.dtype), "libraries": library_versions()}
        write_json(folder / "parity.json", {"least_equal": LEAST_EQUAL} | report | {"dtype": dtype} | computed)
    return report


def adapter_answers(adapter: Adapter, rows: TestRows) -> Answers:
    """What the adapter says on its base in NF4, unmerged and by the plain path, in float32 on every machine.

    In bfloat16 a GPU rounds each product, and on 17 of 2,000 rows of the default recipe that alone decided otherwise:
    two models that are compared so differ by more than what is to be shown.
    """
    import torch

    from serving.export.torch_answers import torch_answers
    from stages.common.model import load_model

    model = load_model(adapter.folder, torch.float32)
    answers = torch_answers(model, adapter, rows, "the adapter")
    del model
    free_memory()
    return answers


def free_memory() -> None:
    """Give back what a model that nothing refers to any more has taken."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_mergeable(folder: Path, decision: Path | None) -> Adapter:
    """An adapter whose base is pinned here.

    Raises:
        UserError: the folder holds none, it is merged already, or its base cannot be had here.
    """
    adapter = read_adapter(folder, decision)
    if adapter.merged:
        raise UserError(f"--adapter: {folder} is a merged model, not an adapter. Give the folder of an adapter.")
    note = pin_base(folder)
    if note is not None:
        print(f"merge: {note}", flush=True)
    return adapter


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m serving.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", metavar="FOLDER", type=Path, default=ADAPTER, help=f"default {ADAPTER}")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=MERGED, help=f"default {MERGED}")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"of the weights, default {DTYPES[0]}")
    parser.add_argument(
        "--rows", metavar="FILE", type=Path, default=TEST_SPLIT, help=f"compared on, default {TEST_SPLIT}"
    )
    parser.add_argument(
        "--decision",
        metavar="FILE",
        type=Path,
        help="thresholds (default: models/decision.json, for models/adapter alone)",
    )
    return parser.parse_args()


def main() -> None:
    """Write the merged model and say how it compares with the adapter."""
    options = arguments()
    adapter = read_mergeable(options.adapter, options.decision)
    rows = read_test_rows(options.rows, adapter)
    print(f"merge: {options.adapter} in {options.dtype}, compared on {len(rows.prompt_ids):,} rows", flush=True)
    import torch

    try:
        report = merge(adapter, rows, options.dtype, options.decision, options.output)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU has too little memory: merging takes 4 bytes for each weight. On the CPU it takes the machine's "
            "memory: `CUDA_VISIBLE_DEVICES= python -m serving.merge`."
        ) from None
    from serving.export.parity import describe

    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"merge: {options.output}, {size / 1e6:,.1f} MB: {describe(report)}")


if __name__ == "__main__":
    run_stage(main)
