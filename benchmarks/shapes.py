"""Base models of known shapes with random weights, in a folder where the pipeline's own code finds and trains them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.workloads import TERMINATOR
from stages.base_model import copy_tokenizer, fetch_base, pin
from stages.common.base import BASE_FOLDER, BASE_PIN, TOKENIZER_FOLDER
from stages.common.errors import UserError
from stages.common.model import machine_device
from stages.common.schema.base_model import FolderModel
from stages.common.tables import read_json, write_json
from tests.tiny import save_tokenizer

LLAMA_3_2: dict[str, Any] = {
    "vocab_size": 128_256,
    "intermediate_size": 8_192,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
    },
}
# As the published config.json files have them.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA_3_2
    | {"hidden_size": 2_048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "llama-3.2-3b": LLAMA_3_2
    | {"hidden_size": 3_072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8_192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    # For tests.
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


def shape_config(name: str) -> LlamaConfig:
    """The configuration of a shape; control tokens as the tokenizer of the tests has them."""
    return LlamaConfig(
        **SHAPES[name], tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=TERMINATOR
    )


def linear_parameters(config: LlamaConfig) -> int:
    """Weights in the decoder's linear layers, without embeddings and LM head: what a token is multiplied with."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = config.head_dim or hidden // heads
    queries, keys = hidden * heads * head_size, hidden * (config.num_key_value_heads or heads) * head_size
    # Queries and output, keys and values; gate, up and down.
    return config.num_hidden_layers * (2 * queries + 2 * keys + 3 * hidden * config.intermediate_size)


def save_random_base(name: str, folder: Path) -> None:
    """Write a base model of this shape, weights in bfloat16 as published ones are, with a tokenizer of 400 tokens."""
    torch.manual_seed(0)
    with machine_device():
        model = AutoModelForCausalLM.from_config(shape_config(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder)


@contextlib.contextmanager
def entered_project(name: str, base: Path | None) -> Iterator[str]:
    """Work in a new folder whose models/ holds a base of this shape, as the stage `base_model` leaves it.

    Args:
        name: the shape.
        base: a folder with a real base model, taken if it has this shape; or None.

    Yields:
        What the weights are, "random" or "real".
    """
    real = base is not None and _has_shape(base, name)
    origin = base.resolve() if base is not None and real else Path("made")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, contextlib.chdir(folder):
        if not real:
            save_random_base(name, origin)
        source = FolderModel(source="folder", path=str(origin))
        BASE_FOLDER.parent.mkdir()
        fetch_base(source, BASE_FOLDER)
        write_json(BASE_PIN, pin(source, BASE_FOLDER))
        copy_tokenizer(BASE_FOLDER, TOKENIZER_FOLDER)
        yield "real" if real else "random"


def _has_shape(base: Path, name: str) -> bool:
    if not (base / "config.json").is_file():
        raise UserError(f"--base: {base} holds no config.json. Give the folder of a saved model, as models/base.")
    config = read_json(base / "config.json")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return all(config.get(size) == SHAPES[name][size] for size in sizes)
