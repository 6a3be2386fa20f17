"""A model's layers made ready for the fast paths that were chosen."""

from __future__ import annotations

from transformers import PreTrainedModel

from stages.common.acceleration.attention import PACKED
from stages.common.acceleration.choice import FastPaths, remember
from stages.common.acceleration.layers import compile_layers, narrow_last_layer


def prepare_layers(decoder: PreTrainedModel, paths: FastPaths) -> None:
    """Pack and compile the decoder's layers, where that was chosen.

    Args:
        decoder: the model without what wraps it; an adapter's layers may sit inside it.
        paths: what was chosen for it.
    """
    if paths.packed is None:
        decoder.set_attn_implementation(PACKED)
        narrow_last_layer(decoder)
    if paths.compiled is None:
        compile_layers(decoder)
    remember(decoder, paths)
