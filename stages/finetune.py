"""Train a LoRA adapter on the NF4-quantised base: loss on the answers alone, the best evaluation kept."""

from __future__ import annotations

import gc
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from stages.common.acceleration.base import trained_and_all_parameters
from stages.common.base import BASE_PIN, TOKENIZER_FOLDER, file_sha256
from stages.common.errors import UserError, listing, run_stage
from stages.common.launching import processes_to_start, run_processes
from stages.common.model import base_is_spread, compute_dtype, machine_device
from stages.common.params import Params, load_params
from stages.common.processes import (
    from_leader,
    joined_processes,
    leader_first,
    leads,
    process_count,
)
from stages.common.schema.finetune import Finetune
from stages.common.tables import read_json, row_count, table_metadata, write_json
from stages.common.training.adapter_folder import hardware, library_versions, published_base, write_companions
from stages.common.training.answer_loss import AnswerLossTrainer
from stages.common.training.callbacks import DivergenceError
from stages.common.training.checkpoints import (
    FINISHED,
    HASHES,
    checkpoint_root,
    fingerprint,
    finished_adapter,
    keep_adapter_alone,
    last_checkpoint,
    locked_run,
    seal,
    shared_dataset,
)
from stages.common.training.reducing import SharedOutOfMemoryError
from stages.common.training.rows import longest_row, read_rows, write_tokens
from stages.common.training.step_rows import ids_of_step
from stages.common.training.stopping import signals_noted
from stages.common.training.trainer import (
    LOG_FOLDER,
    MicroBatch,
    check_shares,
    make_trainer,
    micro_batches,
    refuse_dora,
)

PARTS = {name: Path(f"data/splits/{name}.parquet") for name in ("train", "validation")}
CODE_DIGEST = Path("data/code/finetune.sha256")
ADAPTER = Path("models/adapter")


def train(params: Finetune, folder: Path, rows: dict[str, Dataset]) -> AnswerLossTrainer:
    """Train to the end, from the last checkpoint in `folder` where there is one; smaller batches when memory runs out.

    Args:
        params: the finetune block.
        folder: this run's folder.
        rows: "train" and "validation", as `read_rows` gives them.

    Returns:
        A trainer whose model is the one with the best loss on validation.

    Raises:
        UserError: even one row at a time does not fit, or the loss is no number.
    """
    device, processes = machine_device(), process_count()
    sharded = base_is_spread(processes)
    if sharded:
        refuse_dora(params.lora)
    longest_tokens = longest_row(rows.values())
    for micro in micro_batches(
        params.global_batch_size, longest_tokens, device.type, processes, memory_is_short=sharded
    ):
        checkpoint = from_leader(last_checkpoint(folder) if leads() else None)
        start = f"from {checkpoint.name}" if checkpoint else "from the start"
        recompute = ", activations recomputed" if micro.recompute_activations else ""
        shared = f" on {processes} processes" if processes > 1 else ""
        shared += ", which share the base" if sharded else ""
        print(f"finetune: {micro.rows} rows x {micro.accumulation} a step{shared}{recompute}, {start}", flush=True)
        trainer = make_trainer(params, micro, folder, rows)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            if processes > 1 and not isinstance(error, SharedOutOfMemoryError):
                # The others are in the midst of a step, and would wait for this one for ever.
                raise out_of_memory(micro, longest_tokens) from error
            print(f"finetune: {micro.rows} rows at a time do not fit into the device's memory", flush=True)
        except DivergenceError as error:
            ids = listing(ids_of_step(PARTS["train"], params, rows["train"], error.step), params.global_batch_size)
            raise UserError(
                f"{error} It began with the batch of step {error.step}, in {PARTS['train']} the ids {ids}: look at "
                "these rows. Checkpoints of earlier steps are kept."
            ) from None
        else:
            return trainer
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    raise UserError(
        f"one row of up to {longest_tokens} tokens does not fit into this device's memory. Use a smaller base "
        "model, a smaller format_prompts.max_length_tokens or a larger GPU."
    )


def out_of_memory(micro: MicroBatch, longest_tokens: int) -> UserError:
    """What to do where all processes cannot try again together."""
    fewer = next((rows for rows in range(micro.rows - 1, 0, -1) if micro.rows % rows == 0), None)
    advice = (
        f"Set MICRO_BATCH_SIZE={fewer} in the environment and run again: training continues from its last checkpoint."
        if fewer
        else "Use more or larger GPUs, a smaller base model or a smaller format_prompts.max_length_tokens."
    )
    return UserError(
        f"a GPU is out of memory with {micro.rows} rows of up to {longest_tokens} tokens at a time. {advice}"
    )


def summarise(trainer: AnswerLossTrainer, params: Finetune, available: int) -> dict[str, Any]:
    """What the run came to, without timings: they would make two equal adapters differ.

    Args:
        trainer: after training.
        params: the finetune block.
        available: rows to train on: for several labels a row one for each, with oversampling the repeated ones too.
    """
    state = trainer.state
    trainable, total = trained_and_all_parameters(trainer.adapter)
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "rows_seen": min(available, state.global_step * params.global_batch_size),
        "rows_available": available,
        "best_step": state.best_global_step,
        "best_validation_loss": state.best_metric,
        "final_train_loss": next(entry["loss"] for entry in reversed(state.log_history) if "loss" in entry),
        "trainable_parameters": trainable,
        "total_parameters": total,
    }


def describe_origin(params: dict[str, Any]) -> dict[str, Any]:
    """What made the adapter: base, data and code by their hashes, parameters, libraries and hardware."""
    device, processes = machine_device(), process_count()
    shared = {"processes": str(processes)} if processes > 1 else {}
    return {
        "base": published_base(read_json(BASE_PIN)),
        "data": {name: {"sha256": file_sha256(path), "rows": row_count(path)} for name, path in PARTS.items()},
        "code": CODE_DIGEST.read_text(encoding="utf-8").split()[0],
        "parameters": params,
        "libraries": library_versions(),
        "hardware": hardware(device, compute_dtype(device)) | shared,
    }


def save_adapter(trainer: AnswerLossTrainer, provenance: dict[str, Any], summary: dict[str, Any], run: Path) -> None:
    """Write the adapter into the run's folder, complete or not at all, and remove the run's checkpoints."""
    partial = run / f"{FINISHED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.adapter.save_pretrained(str(partial), save_embedding_layers=False)
    write_companions(partial, provenance, table_metadata(PARTS["train"], "prompt_format"), TOKENIZER_FOLDER)
    shutil.copytree(run / LOG_FOLDER, partial / LOG_FOLDER)
    write_json(partial / LOG_FOLDER / "summary.json", summary)
    seal(partial)
    shutil.rmtree(run / FINISHED, ignore_errors=True)
    partial.replace(run / FINISHED)
    keep_adapter_alone(run)


def main() -> None:
    """Train, or continue an interrupted training, and write models/adapter/; one process for each GPU."""
    params = load_params("finetune", "task")
    processes = processes_to_start()
    if processes is not None:
        check_shares(params.finetune.global_batch_size, processes)
        run_processes(processes, "stages.finetune")
        return
    with joined_processes():
        check_shares(params.finetune.global_batch_size, process_count())
        run(params)


def run(params: Params) -> None:
    """What each process does; rank 0 alone holds the run and writes."""
    values = params.model_dump()
    data = {name: file_sha256(path) for name, path in PARTS.items()}
    key = fingerprint([BASE_PIN, CODE_DIGEST], {"parameters": values, "libraries": library_versions(), "data": data})
    started = time.monotonic()
    with locked_run(checkpoint_root(), key) if leads() else nullcontext(checkpoint_root() / key) as run:
        if from_leader(leads() and finished_adapter(run) is not None):
            print(f"finetune: this very run has ended before; its adapter is used. To train again, remove {run}")
        else:
            with leader_first():
                # What these rows are, the code decides as well; sweeps and resumed runs find them.
                tokens = shared_dataset(run, fingerprint([CODE_DIGEST], data), lambda new: write_tokens(PARTS, new))
                rows = read_rows(PARTS, params.finetune.class_balance, params.finetune.seed, run / "balance", tokens)
            with signals_noted():
                trainer = train(params.finetune, run, rows)
                if leads():
                    summary = summarise(trainer, params.finetune, len(rows["train"]))
                    save_adapter(trainer, describe_origin(values), summary, run)
        if not leads():
            return
        summary = read_json(run / FINISHED / LOG_FOLDER / "summary.json")
        shutil.rmtree(ADAPTER, ignore_errors=True)
        shutil.copytree(run / FINISHED, ADAPTER, ignore=shutil.ignore_patterns(HASHES))
    print(
        f"finetune: {summary['steps']} steps, best validation loss {summary['best_validation_loss']:.4f} at step "
        f"{summary['best_step']}, {summary['trainable_parameters']:,} trained parameters, "
        f"{time.monotonic() - started:,.0f} s"
    )
    if torch.cuda.is_available():
        print(f"finetune: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU at most")


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
