"""A model that `python -m serving.merge` wrote, loaded without bitsandbytes and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.common.acceleration.choice import choose_paths
from stages.common.acceleration.preparing import prepare_layers
from stages.common.errors import UserError, listing
from stages.common.model import compute_dtype, machine_device


def load_merged(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on this machine's device, in evaluation mode.

    Args:
        folder: what `python -m serving.merge` wrote.
        dtype: what it computes in. None: the precision that it is saved in where the hardware multiplies that fast,
            else float32, which holds both bfloat16 and float16 exactly.

    Raises:
        UserError: the folder's weights are absent, incomplete or damaged.
    """
    device = machine_device()
    dtype = dtype or compute_dtype(device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype if dtype == torch.float32 else "auto",
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{folder}: cannot be loaded ({str(error)[:300]}). {_REMEDY}") from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random numbers there.
        raise UserError(f"{folder}: lacks the weights {listing(sorted(report['missing_keys']))}. {_REMEDY}")
    return model.eval()


def load_fast_merged(folder: Path, *, scores_labels: bool) -> PreTrainedModel:
    """The same by the fastest paths that this machine has.

    Args:
        folder: as of `load_merged`.
        scores_labels: whether the model is used for `score_labels`, and for nothing else.

    Raises:
        UserError: as of `load_merged` and `choose_paths`.
    """
    model = load_merged(folder)
    paths = choose_paths(model, 0.0, trains=False)
    if not scores_labels:
        generated = "answers are generated token by token"
        paths = paths._replace(packed=generated, compiled=generated, recorded=generated)
    prepare_layers(model, paths)
    return model


_REMEDY = "Make it again with `python -m serving.merge`, or obtain the whole folder again."
