"""A TRL trainer for QLoRA, made out of params.yaml and of what this machine can hold."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import SFTConfig

from stages.common.acceleration.base import dequantize_base
from stages.common.acceleration.choice import choose_paths, forward_flop
from stages.common.acceleration.preparing import prepare_layers
from stages.common.base import TOKENIZER_FOLDER
from stages.common.errors import UserError
from stages.common.model import compute_dtype, load_base, machine_device
from stages.common.processes import leads, process_count, process_index
from stages.common.schema.finetune import Finetune, Lora
from stages.common.switches import low_memory
from stages.common.training.answer_loss import AnswerLossTrainer
from stages.common.training.callbacks import DVCLiveLog, Watch, trackers
from stages.common.training.collating import collate, collate_packed
from stages.common.training.rows import longest_row, total_tokens
from stages.common.training.stopping import make_batch

LOG_FOLDER = "training_log"
LOG_EVERY_STEPS = 5

# A first guess at what fits; on CUDA, running out of memory makes it smaller. A small CPU batch stays within a few GB.
TOKENS_PER_MICRO_BATCH = {"cpu": 2_048, "cuda": 32_768}
# Few enough to hold no more than the base, and enough to keep a GPU busy with one row after the other.
TOKENS_PER_SMALL_MICRO_BATCH = 2_048
# A GPU would wait for batches that one process makes between its steps.
DATA_WORKERS = {"cpu": 0, "cuda": 2}
# On a GPU, torch's own implementation in one kernel: AdamW on 420 small tensors took 34 of 72 ms of a step without it.
FUSED = {"adamw_torch": "adamw_torch_fused"}


@dataclass(frozen=True)
class MicroBatch:
    """How each process cuts its share of an optimizer step to fit the machine; the product is always that share."""

    rows: int
    accumulation: int
    recompute_activations: bool


def micro_batches(
    global_batch_size: int, longest_tokens: int, device_type: str, processes: int = 1, *, memory_is_short: bool = False
) -> list[MicroBatch]:
    """Ways to cut a step, the fastest first: ever fewer rows at a time, at last with activations recomputed.

    Args:
        global_batch_size: rows of an optimizer step.
        longest_tokens: of the longest row.
        device_type: "cpu" or "cuda".
        processes: that share a step evenly, see `check_shares`.
        memory_is_short: whether activations are recomputed from the first; LOW_MEMORY=1 asks for it too.

    Raises:
        UserError: MICRO_BATCH_SIZE in the environment is no divisor of a process's share, or LOW_MEMORY is neither 0
            nor 1.
    """
    memory_is_short = memory_is_short or low_memory()
    share = global_batch_size // processes
    divisors = [rows for rows in range(share, 0, -1) if share % rows == 0]
    if "MICRO_BATCH_SIZE" in os.environ:
        wanted = os.environ["MICRO_BATCH_SIZE"]
        if wanted not in map(str, divisors):
            shared = f", which {processes} processes share" if processes > 1 else ""
            raise UserError(
                f"MICRO_BATCH_SIZE={wanted} in the environment must divide finetune.global_batch_size "
                f"{global_batch_size}{shared}: one of {divisors}"
            )
        fitting = [rows for rows in divisors if rows <= int(wanted)]
    else:
        tokens = TOKENS_PER_SMALL_MICRO_BATCH if memory_is_short else TOKENS_PER_MICRO_BATCH[device_type]
        most = max(1, tokens // longest_tokens)
        fitting = [rows for rows in divisors if rows <= most]
    if memory_is_short:
        return [MicroBatch(rows, share // rows, recompute_activations=True) for rows in fitting]
    plain = [MicroBatch(rows, share // rows, recompute_activations=False) for rows in fitting]
    return [*plain, MicroBatch(1, share, recompute_activations=True)]


def check_shares(global_batch_size: int, processes: int) -> None:
    """Refuse a number of processes that cannot share a step's rows evenly.

    Raises:
        UserError: it does not divide the global batch size.
    """
    if global_batch_size % processes:
        allowed = [count for count in range(1, global_batch_size + 1) if global_batch_size % count == 0]
        raise UserError(
            f"{processes} processes (one for each GPU) cannot share the {global_batch_size} rows of a step evenly. Set "
            f"NUM_PROCESSES in the environment to one of {allowed}, or make finetune.global_batch_size a multiple of "
            f"{processes}; that changes the result."
        )


def lora_config(params: Finetune) -> LoraConfig:
    """PEFT's configuration of the adapter."""
    modules = params.lora.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=params.lora.r,
        lora_alpha=params.lora.alpha,
        lora_dropout=params.lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        use_rslora=params.lora.use_rslora,
        use_dora=params.lora.use_dora,
    )


def trainer_config(params: Finetune, micro: MicroBatch, folder: Path, device: torch.device) -> SFTConfig:
    """TRL's configuration of a run that writes its checkpoints to `folder`."""
    return SFTConfig(
        output_dir=str(folder),
        seed=params.seed,
        data_seed=params.seed,
        num_train_epochs=params.epochs or 1,
        max_steps=params.max_steps or -1,
        per_device_train_batch_size=micro.rows,
        per_device_eval_batch_size=micro.rows,
        gradient_accumulation_steps=micro.accumulation,
        gradient_checkpointing=micro.recompute_activations,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        optim=FUSED.get(params.optimizer, params.optimizer) if device.type == "cuda" else params.optimizer,
        max_grad_norm=params.max_gradient_norm,
        logging_steps=LOG_EVERY_STEPS,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=params.evaluate_every_steps,
        save_strategy="steps",
        save_steps=params.evaluate_every_steps,
        load_best_model_at_end=True,
        # Otherwise a resumed run would forget how long the loss has not improved, and stop later.
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        use_cpu=device.type == "cpu",
        bf16=compute_dtype(device) == torch.bfloat16,
        fp16=False,
        dataloader_pin_memory=device.type == "cuda",
        # Otherwise the host would wait with each batch until the GPU has done the step before.
        accelerator_config={"non_blocking": device.type == "cuda"},
        dataloader_num_workers=DATA_WORKERS[device.type],
        dataloader_persistent_workers=DATA_WORKERS[device.type] > 0,
        report_to=trackers(),
        max_length=None,
        remove_unused_columns=False,
        # Rows are tokens already, so that training sees exactly what scoring sees; the collator joins and masks them.
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _load_tokenizer() -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(TOKENIZER_FOLDER), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{TOKENIZER_FOLDER}: is not complete ({problem}). Run `dvc repro base_model`.") from error


def refuse_dora(lora: Lora) -> None:
    """Refuse DoRA beside a base that is sharded.

    Raises:
        UserError: it is asked for.
    """
    if lora.use_dora:
        raise UserError(
            "finetune.lora.use_dora: starts from the norms of whole weights, and no GPU has them, since one could not "
            "hold this base. Set it to false, or take a smaller base model."
        )


def make_trainer(params: Finetune, micro: MicroBatch, folder: Path, rows: dict[str, Dataset]) -> AnswerLossTrainer:
    """A trainer with a freshly loaded base and a freshly initialised adapter."""
    # TRL 1.16 still uses the old name of an option that transformers renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    device = machine_device()
    set_seed(params.seed)  # before the adapter is initialised: otherwise each run is another model
    tokenizer = _load_tokenizer()
    callbacks: list[TrainerCallback] = [DVCLiveLog(folder / LOG_FOLDER)] if leads() else []
    if params.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(params.early_stopping_patience))
    base = load_base(trains=True)
    flop = 2 * forward_flop(base, trained_tokens(params, rows["train"])) / process_count()
    paths = choose_paths(
        base, flop, trains=True, dropout=params.lora.dropout, memory_is_short=micro.recompute_activations
    )
    print(f"finetune: {paths}", flush=True)
    if paths.dense is None:
        dequantize_base(base)
    to_batch = collate_packed if paths.packed is None else collate
    try:
        trainer = AnswerLossTrainer(
            model=base,
            args=trainer_config(params, micro, folder, device),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=tokenizer,
            peft_config=lora_config(params),
            data_collator=functools.partial(make_batch, to_batch, pad_id=tokenizer.pad_token_id or 0),
            callbacks=callbacks,
        )
    except ValueError as error:
        if "target module" not in str(error).lower():
            raise
        raise UserError(f"finetune.lora.target_modules: {error}") from error
    trainer.add_callback(Watch(trainer))
    for parameter in trainer.adapter.parameters():
        if parameter.requires_grad:
            # TRL makes them bfloat16, which is slow on a CPU and rounds small updates away.
            parameter.data = parameter.data.float()
    if process_count() > 1:
        set_seed(params.seed + process_index())  # otherwise each process would drop the same places of its rows
    prepare_layers(base, paths)
    longest = longest_row(rows.values())
    # What fills a micro-batch up is at most a 32nd of it, see `round_up`.
    trainer.most_tokens_of_a_row = max(longest, micro.rows * longest // 32, 8)
    trainer.records_steps = paths.recorded is None
    return trainer


def trained_tokens(params: Finetune, rows: Dataset) -> float:
    """How many tokens a run of so many steps or epochs sees."""
    seen = (params.epochs or 0) * len(rows) if params.max_steps is None else params.max_steps * params.global_batch_size
    return seen * total_tokens(rows) / len(rows)
