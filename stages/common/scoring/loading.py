"""A base model and an adapter loaded to predict with, by the fastest paths that this machine has."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from stages.common.acceleration.base import dequantize_base
from stages.common.acceleration.choice import choose_paths, forward_flop
from stages.common.acceleration.preparing import prepare_layers
from stages.common.model import add_adapter, check_adapter, load_base
from stages.common.scoring.label_scores import language_model


def load_fast_model(adapter: Path | None, tokens: int, *, scores_labels: bool) -> PreTrainedModel | PeftModel:
    """The base model with the adapter in the folder `adapter`, as fast as this machine predicts with it.

    Where the base is dequantised the adapter is merged into it: its product is added to the weights, which rounds them
    once instead of rounding both outputs.

    Args:
        adapter: None for the base alone.
        tokens: of all prompts together, by which it is judged whether compiling pays.
        scores_labels: whether the model is used for `score_labels`, and for nothing else.

    Raises:
        UserError: as of `load_model` and `choose_paths`.
    """
    if adapter is not None:
        check_adapter(adapter)
    base = load_base()
    paths = choose_paths(base, forward_flop(base, tokens), trains=False)
    if not scores_labels:
        generated = "answers are generated token by token"
        paths = paths._replace(packed=generated, compiled=generated, recorded=generated)
    if paths.dense is None:
        dequantize_base(base)
    model = base if adapter is None else add_adapter(base, adapter)
    if paths.dense is None and isinstance(model, PeftModel) and not _adapts_embeddings(model):
        model = model.merge_and_unload()
    prepare_layers(language_model(model), paths)
    return model


def _adapts_embeddings(model: PeftModel) -> bool:
    """Whether the adapter changes the embeddings or the LM head: tied, they would both be changed by merging."""
    decoder = language_model(model)
    return any(
        isinstance(end, BaseTunerLayer) for end in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    )
