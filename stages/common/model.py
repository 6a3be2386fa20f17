"""Loading the base model as QLoRA trains it, with or without an adapter, on whatever this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stages.common.base import ensure_base
from stages.common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def machine_device() -> torch.device:
    """The CUDA device of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it fast, else float32.

    On a CPU it is always float32: bfloat16 without AVX512-BF16 or AMX is some 25 times slower, and results should not
    depend on which CPU there is.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def load_base() -> PreTrainedModel:
    """The base model with its linear layers in NF4 with double quantisation (Dettmers et al. 2023, QLoRA).

    Returns:
        A causal language model in evaluation mode on this machine's device.

    Raises:
        UserError: the base cannot be fetched, differs from its pin, or has no architecture that transformers knows.
    """
    folder = ensure_base()
    device = machine_device()
    dtype = compute_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        # A relative path: it is written into the adapter's configuration.
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except ValueError as error:
        raise UserError(f"{folder}: transformers cannot load this base model: {error}") from error
    return model.eval()


def load_model(adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter in the folder `adapter` on top unless that is None."""
    model = load_base()
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()
