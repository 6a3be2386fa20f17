"""The NF4 base dequantised in memory: the same weights that each forward pass would dequantise anew."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel


def linear_parameters(model: torch.nn.Module) -> int:
    """Weights in the quantised layers: those that every token is multiplied with."""
    return sum(module.in_features * module.out_features for module in _quantized(model).values())


def trained_and_all_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """How many weights are trained, and how many there are: of a quantised layer what it stands for, sharded or not."""
    layers = _quantized(model).values()
    packed = {id(module.weight) for module in layers}
    others = [weight for weight in model.parameters() if id(weight) not in packed]
    return sum(one.numel() for one in others if one.requires_grad), linear_parameters(model) + sum(
        one.numel() for one in others
    )


def dequantize_base(model: PreTrainedModel) -> None:
    """Replace each NF4 layer by an ordinary one, its weights in the model's dtype.

    These are the very numbers that bitsandbytes multiplies with, so that results do not change. Two bytes for each
    weight instead of half a byte in bfloat16, four in float32.
    """
    for name, quantized in _quantized(model).items():
        packed: Any = quantized.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).to(model.dtype)
        layer = torch.nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.bias = quantized.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(quantized.training))
    # Otherwise PEFT and TRL would go on treating the layers as NF4.
    unmarked: Any = model
    unmarked.is_loaded_in_4bit = unmarked.is_quantized = False
    unmarked.hf_quantizer = unmarked.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _quantized(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
