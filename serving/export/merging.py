"""An adapter merged into the very weights that it was trained on: the base's NF4 layers, dequantised."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import GenerationConfig, PreTrainedModel

from stages.common.acceleration.base import dequantize_base
from stages.common.errors import UserError
from stages.common.model import add_adapter, load_base
from stages.common.prompting.prompts import PromptFormat
from stages.common.prompting.tokenizer import PromptTokenizer
from stages.common.scoring.label_scores import language_model


def merge_adapter(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model with the adapter's product added to its weights.

    PEFT's own merging into 4-bit layers would quantise the sum again, which is another model. Here each layer's sum is
    made in float32 and rounded once, so that the result is the same on every machine.

    Args:
        folder: the adapter.
        dtype: of the merged weights.

    Returns:
        An ordinary causal language model, without PEFT's and bitsandbytes' layers.

    Raises:
        UserError: the adapter or its base cannot be had, or the adapter cannot be merged without changing what it does.
    """
    base = load_base(torch.float32)
    dequantize_base(base)
    model = add_adapter(base, folder)
    _check_mergeable(model, folder)
    try:
        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            layer.float()
            layer.merge(safe_merge=True)
            layer.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            # This takes PEFT's layers off, and puts fully trained modules into their places.
            merged: PreTrainedModel = model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{folder}: cannot be merged: {error}. Serve the adapter itself.") from error
    torch.nn.Module.to(merged, dtype)
    _check_finite(merged, folder)
    return merged.eval()


def _check_mergeable(model: PeftModel, folder: Path) -> None:
    if not isinstance(model.base_model, BaseTuner):
        kind = str(model.active_peft_config.peft_type).removeprefix("PeftType.")
        raise UserError(
            f"{folder}: is a {kind} adapter, which changes prompts and not weights, so that there is nothing to merge. "
            "Serve the adapter itself."
        )
    decoder = language_model(model)
    ends = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    if decoder.config.tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends
    ):
        raise UserError(
            f"{folder}: adapts the embeddings or the LM head, and in this base model they are one matrix "
            "(tie_word_embeddings), so that merging would change both. Serve the adapter itself, or train with "
            "finetune.lora.target_modules: all-linear, which leaves them alone."
        )


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{folder}: merged, {name} holds numbers that {weight.dtype} has no room for. Merge with --dtype "
                "bfloat16, which has the range of float32."
            )


def greedy_generation(prompt_format: PromptFormat, tokenizer: PromptTokenizer) -> GenerationConfig:
    """How the merged model generates by itself: greedily up to this project's terminators, as all was measured."""
    bos = tokenizer.control_ids.get(tokenizer.special_tokens.get("bos_token", ""))
    return GenerationConfig(
        do_sample=False,
        bos_token_id=bos,
        eos_token_id=list(prompt_format.terminator_ids),
        pad_token_id=tokenizer.pad_id,
    )
