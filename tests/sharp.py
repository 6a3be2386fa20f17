"""A tiny decoder whose answers depend on every token before them, unlike those of a freshly initialised one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def sharp_model(base_folder: Path) -> Any:
    """The shape of the tiny base with large random weights in float32."""
    torch.manual_seed(0)
    # Tied random embeddings repeat the last token for ever.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder, tie_word_embeddings=False))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # or every context gives nearly the same answer
    return model.eval()


def log_likelihood(model: Any, prompt: list[int], answer: Sequence[int]) -> float:
    """The sum over the answer's tokens of ln p(token | all before), from a full forward pass over this row alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    steps = logits.double().log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return float(steps.sum())


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, one full forward pass for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
