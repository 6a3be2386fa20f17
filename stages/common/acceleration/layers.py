"""Decoder layers: the last one computed only where its output is used, all of them compiled."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

# Models whose layers are x + attention(norm(x)), then x + mlp(norm(x)), and whose logits are head(norm(x)).
PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The layers of a model whose type is in `PRE_NORM`."""
    layers = model.get_decoder().layers
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def narrow_last_layer(model: PreTrainedModel) -> None:
    """Let the last layer give its output, and so the model its logits, at the positions `kept` alone.

    Attention needs keys and values of every position; what follows it (its output projection, the MLP, the norm and
    the LM head) is needed where a token is predicted. The model's forward pass takes `kept` from now on: int64, the
    places in its one sequence.
    """
    last = decoder_layers(model)[-1]
    last.forward = functools.partial(_narrow_forward, last)


def _narrow_forward(layer: Any, hidden_states: torch.Tensor, kept: torch.Tensor, **named: Any) -> torch.Tensor:
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, arguments: (arguments[0][:, kept],))
    try:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
    finally:
        hook.remove()
    hidden_states = hidden_states[:, kept] + attended
    outputs: torch.Tensor = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return outputs


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the layers' forward passes, once for all of them and for every length; the last one stays as it is."""
    for layer in decoder_layers(model)[:-1]:
        layer.compile(dynamic=True)


def are_compiled(model: PreTrainedModel) -> bool:
    """Whether `compile_layers` was called."""
    return decoder_layers(model)[0]._compiled_call_impl is not None
