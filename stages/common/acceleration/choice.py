"""Which fast paths a run takes: by what model and machine can do, how much work there is, and the environment.

Results differ by rounding alone, so nothing here is in params.yaml; `stages.common.switches` has the switches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from stages.common.acceleration.base import linear_parameters
from stages.common.acceleration.layers import PRE_NORM
from stages.common.errors import UserError
from stages.common.sharding import is_laid_out, is_sharded
from stages.common.switches import SWITCHES, low_memory, switch

# Compiling takes 10 to 20 s, and 80 s the first time on a machine; it then saves two fifths of a step on an H200, where
# this is some 80 s of work, see docs/performance.md.
LEAST_COMPILED_FLOP = 2e16
# The dequantised base may take this share of the memory that is free.
MOST_DENSE_SHARE = 0.25
MOST_HEAD_SIZE = 256  # FlashAttention's limit


class FastPaths(NamedTuple):
    """For each path why it is not taken, or None where it is.

    Attributes:
        packed: rows without padding, the last layer narrowed.
        dense: the base dequantised in memory, and in inference the adapter merged into it.
        compiled: layers compiled.
        recorded: steps recorded as CUDA graphs.
    """

    packed: str | None
    dense: str | None
    compiled: str | None
    recorded: str | None

    def __str__(self) -> str:
        """A line for the log: which are taken, and why the others are not."""
        said = list(zip(SWITCHES.values(), self, strict=True))
        taken = ", ".join(what for what, reason in said if reason is None) or "none"
        return "; ".join([f"fast paths: {taken}", *(f"not {what}: {why}" for what, why in said if why is not None)])


def choose_paths(
    model: PreTrainedModel, flop: float, *, trains: bool, dropout: float = 0.0, memory_is_short: bool = False
) -> FastPaths:
    """The fast paths for a base model in NF4 on its device.

    Args:
        model: the base as `load_base` gives it.
        flop: arithmetic of the whole run; see `forward_flop`.
        trains: whether an adapter is trained on it; else it is used for predictions.
        dropout: of the adapter that is trained.
        memory_is_short: whether activations are recomputed to save memory.

    Raises:
        UserError: a switch in the environment is neither 0 nor 1, or asks for what model or machine cannot do.
    """
    packed = _decide("PACK_ROWS", packing_obstacle(model), None)
    spread = _spread(model)
    dense = _decide(
        "DENSE_BASE", spread, _dense_doubt(model, trains=trains) or ("memory is short" if memory_is_short else None)
    )
    needs_packing = spread or (None if packed is None else "it needs rows without padding")
    needs_gpu = None if model.device.type == "cuda" else "there is no GPU"
    small = None if flop >= LEAST_COMPILED_FLOP else f"{flop / 1e15:,.1f} PFLOP are too few for it to pay"
    compiled = _decide("COMPILE_LAYERS", needs_packing, needs_gpu or small)
    obstacle = needs_gpu or needs_packing or _recording_obstacle(model, dropout, memory_is_short)
    return FastPaths(packed, dense, compiled, _decide("RECORD_STEPS", obstacle, None))


def remember(model: PreTrainedModel, paths: FastPaths) -> None:
    """Keep with a model what was chosen for it."""
    with_paths: Any = model
    with_paths.fast_paths = paths


def fast_paths(model: PreTrainedModel) -> FastPaths:
    """What `remember` has kept."""
    paths: object = model.fast_paths
    assert isinstance(paths, FastPaths)
    return paths


def forward_flop(model: PreTrainedModel, tokens: float) -> float:
    """Multiplications and additions of a forward pass over so many tokens: two for each weight (Kaplan et al. 2020).

    A backward pass through frozen weights takes as many again.
    """
    return 2.0 * linear_parameters(model) * tokens


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Why rows cannot be laid end to end in this model on its device, or None."""
    if is_laid_out(model):
        return _spread(model)
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in PRE_NORM:
        return f"{config.model_type} is not among {', '.join(PRE_NORM)}"
    if any(kind != "full_attention" for kind in get_layer_types_and_kwargs(config)[0]):
        return f"layers of this {config.model_type} do not see all of a row"
    if getattr(config, "attention_dropout", 0):
        return "the model has dropout in its attention"
    if model.device.type == "cuda":
        if model.dtype != torch.bfloat16:
            return "this GPU has no fast bfloat16"
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size > MOST_HEAD_SIZE or size % 8:
            return f"its heads have {size} numbers: FlashAttention takes multiples of 8 up to {MOST_HEAD_SIZE}"
    return None


def _recording_obstacle(model: PreTrainedModel, dropout: float, memory_is_short: bool) -> str | None:
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "its positions depend on the longest row of a batch"
    if dropout:
        return "finetune.lora.dropout draws random numbers"
    return "activations are recomputed" if memory_is_short else None


def _spread(model: PreTrainedModel) -> str | None:
    if is_sharded(model):
        return "the base is sharded"
    return "the base's layers lie on several GPUs" if is_laid_out(model) else None


def _dense_doubt(model: PreTrainedModel, *, trains: bool) -> str | None:
    if low_memory():
        return "LOW_MEMORY=1"
    on_gpu = model.device.type == "cuda"
    if trains and not on_gpu:
        return "a CPU gains nothing by it in training"
    needed = linear_parameters(model) * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else available_memory()
    if needed > MOST_DENSE_SHARE * free:
        return f"it would take {needed / 2**30:.1f} of {free / 2**30:.1f} GiB that are free"
    return None


def available_memory() -> int:
    """Bytes of main memory that this process may still take, in a container of what the container has."""
    free = psutil.virtual_memory().available
    most, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if most.is_file() and (limit := most.read_text().strip()) != "max":
        free = min(free, int(limit) - int(used.read_text()))
    return free


def _decide(name: str, obstacle: str | None, doubt: str | None) -> str | None:
    """None where the path is taken, else why not: what makes it impossible, or what speaks against it."""
    wanted = switch(name)
    if wanted is False:
        return f"{name}=0"
    if wanted and obstacle:
        raise UserError(f"{name}=1 in the environment asks for {SWITCHES[name]}, which cannot be had: {obstacle}")
    return obstacle or (None if wanted else doubt)
