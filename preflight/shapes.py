"""What of a base model decides about memory and time, read from its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from stages.common.errors import UserError
from stages.common.sharding import nf4_bytes
from stages.common.tables import read_json


class Shape(NamedTuple):
    """What of a base model decides about memory and time; the names are those of config.json."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def linear_inputs_and_outputs(self) -> list[tuple[int, int]]:
        """Of a layer's seven matrices: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with, and that are quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_inputs_and_outputs)

    def lora_parameters(self, rank: int) -> int:
        """Weights of an adapter on all of these matrices."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_inputs_and_outputs)

    @property
    def other_parameters(self) -> int:
        """Weights that are not quantised: embeddings, an LM head of its own, norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def quantized_bytes(self) -> float:
        """Of the whole base in NF4 on a GPU."""
        return nf4_bytes(self.linear_parameters, self.other_parameters, 2)


def read_shape(config: dict[str, Any], source: str) -> Shape:
    """The shape that a config.json describes.

    Args:
        config: its values.
        source: where it lies, for the message.

    Raises:
        UserError: it describes no decoder of the known kind.
    """
    try:
        values = config.get("text_config") or config
        if any(values.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise UserError(f"{source}: a mixture of experts, whose memory is not predicted. Plan by a base without.")
        shape = Shape(
            model_type=str(values.get("model_type", "llama")),
            layers=int(values["num_hidden_layers"]),
            hidden=int(values["hidden_size"]),
            intermediate=int(values["intermediate_size"]),
            heads=int(values["num_attention_heads"]),
            key_heads=int(values.get("num_key_value_heads") or values["num_attention_heads"]),
            head_size=int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]),
            vocabulary=int(values["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", values.get("tie_word_embeddings", False))),
        )
        if min(shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.key_heads, shape.vocabulary) < 1:
            raise ValueError("a number that is 0")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"{source}: does not describe a decoder ({error!r}). Wanted are numbers under num_hidden_layers, "
            "hidden_size, intermediate_size, num_attention_heads and vocab_size, as config.json of a base model has "
            "them."
        ) from None
    return shape


def shape_of_file(path: Path) -> Shape:
    """The shape in a config.json, or in the folder that holds one."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: not found. Give a config.json, or the folder of a base model.")
    return read_shape(read_json(file), str(file))
