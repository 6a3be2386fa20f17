"""A base model on several GPUs: its layers sharded while it is trained on (FSDP), or laid out one after the other.

To train, each process keeps a part of each decoder layer, and gathers a whole layer when its turn comes (Zhao et al.
2023, PyTorch FSDP). What is trained, and what lies outside the layers, is whole on every GPU: adapter, optimizer and
checkpoints are those of any other run, and no gradient is sharded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.common.errors import UserError
from stages.common.processes import largest, process_count, process_index
from stages.common.switches import SHARD_BASE, switch

# NF4 with double quantisation: half a byte, a byte for each block of 64, four for each 256 of those (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# A base that takes more of a GPU's memory is sharded; the rest is for the adapter, its optimizer and activations.
MOST_OF_A_GPU = 0.7
# What transformers reads when an FSDP of accelerate's has parts of a model to itself: it then leaves the others alone.
_PARTS_ARE_ABSENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def is_spread(folder: Path, dtype: torch.dtype, gpus: int) -> bool:
    """Whether a base lies on several GPUs: where one of them could not hold it, or SHARD_BASE=1 asks for it.

    Args:
        folder: the base model's.
        dtype: of what is not quantised.
        gpus: how many there are to lie on, or processes where there is no GPU.

    Raises:
        UserError: SHARD_BASE is neither 0 nor 1, or the base has no architecture that transformers knows.
    """
    wanted = switch(SHARD_BASE)
    if gpus == 1 or wanted is not None:
        return gpus > 1 and bool(wanted)
    if not torch.cuda.is_available():
        return False
    memory = torch.cuda.get_device_properties().total_memory
    # GPUs may differ, and all processes have to do the same.
    return bool(largest(base_bytes(skeleton(folder, dtype)) > MOST_OF_A_GPU * memory))


def base_bytes(model: PreTrainedModel) -> float:
    """What a base model takes with its linear layers in NF4, its LM head as it is.

    Args:
        model: not quantised; its weights need not be there.
    """
    return _bytes(model, model)


def nf4_bytes(linear_parameters: int, other_parameters: int, bytes_each: int) -> float:
    """Bytes of so many weights in NF4, and of others of which each takes `bytes_each`."""
    return linear_parameters * NF4_BYTES + other_parameters * bytes_each


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model without its weights.

    Raises:
        UserError: it has no architecture that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{folder}: transformers cannot load this base model: {error}") from error
    return model


def own_part(model: PreTrainedModel, device: torch.device) -> dict[str, torch.device]:
    """Where this process loads what: every so many layers and all that lies outside of them; the others nowhere.

    Each layer is read, and quantised, by one process. Until all are sharded none holds more than its share.
    """
    # Own layers too: to transformers, layer 10 begins as layer 1 does, and would lie where that lies.
    return {"": device} | {
        name: device if _owner(index) == process_index() else torch.device("meta")
        for index, name in enumerate(_layers(model))
    }


def laid_out(model: PreTrainedModel, gpus: int) -> dict[str, torch.device]:
    """Where one process that predicts loads what: layers on all GPUs, one after the other, about as much on each.

    All that lies outside of them is on the first one. So are then the outputs of the last norm, of which transformers
    takes those that a prompt's positions ask for without asking where either lies.

    Args:
        model: its weights need not be there.
        gpus: of this process.
    """
    layers = _layers(model)
    sizes = [_bytes(layer, model) for layer in layers.values()]
    whole = _bytes(model, model)
    before = itertools.accumulate(sizes, initial=whole - sum(sizes))
    placed = {name: torch.device("cuda", int(gpus * size / whole)) for name, size in zip(layers, before, strict=False)}
    around = {"", *(name[:end] for name in layers for end, letter in enumerate(name) if letter == ".")}
    outside = [
        name
        for name, _ in model.named_modules()
        if name not in around | {*layers} and name.rpartition(".")[0] in around
    ]
    return dict.fromkeys(outside, torch.device("cuda", 0)) | placed


@contextmanager
def parts_absent() -> Iterator[None]:
    """In the block, transformers may load a model of which parts are nowhere."""
    before = {name: os.environ.get(name) for name in _PARTS_ARE_ABSENT}
    os.environ.update(_PARTS_ARE_ABSENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Shard the layers of which each process has loaded its part; see `own_part`."""
    mesh = init_device_mesh(device.type, (process_count(),))
    for index, layer in enumerate(_layers(model).values()):
        _complete(layer, _owner(index), device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for linear in (module for module in layer.modules() if isinstance(module, Linear4bit)):
            # PEFT asks the weight for it, and a sharded one does not know.
            weight: Any = linear.weight
            weight.compress_statistics, weight.quant_type = True, "nf4"
    decoder = model.get_decoder()
    # The root, by which layers know of each other, and the next one is gathered while one is computed.
    fully_shard(
        decoder, mesh=mesh, ignored_params={one for one in decoder.parameters() if not isinstance(one, DTensor)}
    )
    placed: Any = model
    placed.hf_device_map = {"": device}


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether `shard_layers` has sharded it."""
    return isinstance(model.get_decoder(), FSDPModule)


def is_laid_out(model: PreTrainedModel) -> bool:
    """Whether its layers lie on several GPUs of this process."""
    return len({*getattr(model, "hf_device_map", {}).values()}) > 1


def _bytes(part: torch.nn.Module, model: PreTrainedModel) -> float:
    head = model.get_output_embeddings()
    linear = [one.weight for one in part.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    quantized = sum(weight.numel() for weight in linear)
    others = sum(weight.numel() for weight in part.parameters()) - quantized
    return nf4_bytes(quantized, others, model.dtype.itemsize)


def _layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The decoder layers, by the names that they have in the model: what transformers never lays on two devices."""
    decoder = model.get_decoder()
    inside = {*decoder.modules()}
    kinds = set(model._no_split_modules or ())
    return {
        name: module for name, module in model.named_modules() if type(module).__name__ in kinds and module in inside
    }


def _owner(index: int) -> int:
    return index % process_count()


def _complete(layer: torch.nn.Module, owner: int, device: torch.device) -> None:
    """Give every process the whole layer that the process `owner` has loaded."""
    own = dict(layer.named_buffers()) | layer.state_dict() if process_index() == owner else {}
    described = [{name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}]
    distributed.broadcast_object_list(described, src=owner)
    whole = {}
    for name, (shape, dtype) in described[0].items():
        # Not bitsandbytes' kind of tensor, which would quantise it once more.
        mine = own[name].detach().as_subclass(torch.Tensor).to(device).contiguous() if own else None
        whole[name] = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine
        distributed.broadcast(whole[name], src=owner)
    for name, module in layer.named_modules():
        _fill(module, f"{name}." if name else "", whole, device)


def _fill(module: torch.nn.Module, prefix: str, whole: dict[str, torch.Tensor], device: torch.device) -> None:
    for name in [name for name, weight in module._parameters.items() if weight is not None]:
        full = prefix + name
        if isinstance(module, Linear4bit) and name == "weight":
            scales = {key.removeprefix(f"{full}."): value for key, value in whole.items() if key.startswith(f"{full}.")}
            weight: Any = Params4bit.from_prequantized(whole[full], scales, device=device, module=module)
        else:
            weight = torch.nn.Parameter(whole[full], requires_grad=False)
        module._parameters[name] = weight
    for name in module._buffers:
        module._buffers[name] = whole[prefix + name]
