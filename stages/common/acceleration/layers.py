"""Decoder layers: the last one computed only where its output is used, all of them compiled."""

from __future__ import annotations

import functools
import threading
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
    last: Any = decoder_layers(model)[-1]
    last.forward = functools.partial(_narrow_forward, last)
    last.self_attn.o_proj.register_forward_pre_hook(_keep)


# What a thread's forward pass keeps: the attention layer does not hand it on to its output projection.
_here = threading.local()


def _keep(_module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (arguments[0][:, _here.kept],)


def _narrow_forward(layer: Any, hidden_states: torch.Tensor, kept: torch.Tensor, **named: Any) -> torch.Tensor:
    _here.kept = kept
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
    hidden_states = hidden_states[:, kept] + attended
    outputs: torch.Tensor = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return outputs


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the layers' forward passes, once for all of them and for every length; the last one stays as it is."""
    for layer in decoder_layers(model)[:-1]:
        layer.compile(dynamic=True)
