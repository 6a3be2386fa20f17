"""Loading the base model as QLoRA trains it, with or without an adapter, on whatever this machine has."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stages.common.acceleration.determinism import settle_determinism
from stages.common.base import BASE_FOLDER, BASE_PIN, ensure_base
from stages.common.errors import UserError, listing
from stages.common.processes import from_leader, leader_first, process_count
from stages.common.sharding import is_spread, laid_out, own_part, parts_absent, shard_layers, skeleton
from stages.common.tables import read_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def machine_device() -> torch.device:
    """The CUDA device of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it fast, else float32.

    On a CPU it is always float32: bfloat16 without AVX512-BF16 or AMX is some 25 times slower, and results should not
    depend on which CPU there is.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def base_is_spread(processes: int) -> bool:
    """Whether the base lies on several GPUs, where one could not hold it; it is fetched first when it is absent.

    Args:
        processes: how many share the work, or will.

    Raises:
        UserError: the base cannot be fetched or read, or SHARD_BASE in the environment is neither 0 nor 1.
    """
    folder = BASE_FOLDER if BASE_FOLDER.is_dir() else _fetched_base()
    return is_spread(folder, compute_dtype(machine_device()), processes)


def _fetched_base() -> Path:
    # Where it has to be fetched, one process does it.
    with leader_first() if from_leader(not BASE_FOLDER.is_dir()) else nullcontext():
        return ensure_base()


def load_base(dtype: torch.dtype | None = None, *, trains: bool = False) -> PreTrainedModel:
    """The base model with its linear layers in NF4 with double quantisation (Dettmers et al. 2023, QLoRA).

    Where one GPU could not hold it, it lies on several: sharded over the processes that train on it, or with its layers
    on all GPUs of the one process that predicts.

    Args:
        dtype: what it computes in; None: `compute_dtype`.
        trains: whether an adapter is trained on it, by all processes in step.

    Returns:
        A causal language model in evaluation mode on this machine's device.

    Raises:
        UserError: the base cannot be fetched, differs from its pin, lacks weights, or has no architecture that
            transformers knows; or one GPU could not hold it, and several processes are to predict.
    """
    settle_determinism()
    folder = _fetched_base()
    device = machine_device()
    dtype = dtype or compute_dtype(device)
    is_shared = process_count() > 1 and is_spread(folder, dtype, process_count())
    if is_shared and not trains:
        raise UserError(
            f"{folder}: lies on several GPUs, where one could not hold it or SHARD_BASE=1 asks for it, and then one "
            "process predicts with all of them. Start the command by itself, without a launcher."
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP takes floating-point numbers only, whatever their bits stand for; in bfloat16, adapters would be too.
        bnb_4bit_quant_storage=torch.float32 if is_shared else torch.uint8,
    )
    device_map: dict[str, torch.device] = {"": device}
    if is_shared:
        device_map = own_part(skeleton(folder, dtype), device)
    elif not trains and process_count() == 1 and is_spread(folder, dtype, gpus := max(1, torch.cuda.device_count())):
        device_map = laid_out(skeleton(folder, dtype), gpus)
    try:
        with parts_absent() if is_shared else nullcontext():
            # A relative path: it is written into the adapter's configuration.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                quantization_config=quantization,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{folder}: transformers cannot load this base model: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random numbers there.
        raise UserError(
            f"{folder}: its safetensors lack the weights {listing(sorted(report['missing_keys']))}. Choose another "
            "revision or base model, or save this one again."
        )
    if is_shared:
        shard_layers(model, device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes would repack the weights at the first evaluation, with scales in
            # bfloat16: a base that is another one before and after it, so that a resumed training ends elsewhere.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_model(adapter: Path | None, dtype: torch.dtype | None = None) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter in the folder `adapter` on top unless that is None.

    Args:
        adapter: as PEFT saves it.
        dtype: as of `load_base`.

    Raises:
        UserError: there is no adapter, it is damaged or of another base, or the base cannot be had; see `load_base`.
    """
    if adapter is None:
        return load_base(dtype)
    check_adapter(adapter)
    return add_adapter(load_base(dtype), adapter)


def check_adapter(adapter: Path) -> None:
    """Refuse what is no adapter of the pinned base before the base is loaded.

    Raises:
        UserError: there is no adapter, or it is of another base.
    """
    # PEFT would look for it on the Hub.
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: holds no adapter. Fetch the committed one with `dvc pull {adapter}`, or train one with "
            "`dvc repro finetune`."
        )
    # PEFT would take pickled weights in their place, and run what code torch lets them have.
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{adapter}: lacks adapter_model.safetensors. Weights are loaded from safetensors only, since pickled ones "
            f"(adapter_model.bin) can run code. Restore it with `dvc pull --force {adapter}`, or run `dvc repro "
            "finetune`."
        )
    trained_on = adapter / "base.json"
    if trained_on.is_file() and read_json(trained_on)["files"] != read_json(BASE_PIN)["files"]:
        raise UserError(f"{adapter}: was trained on another base model than {BASE_PIN} pins. Run `dvc repro finetune`.")


def add_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base with the adapter in the folder `adapter` on top, in evaluation mode.

    Raises:
        UserError: the adapter is damaged or does not fit.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter)).eval()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{adapter}: does not fit the base model, or is damaged ({str(error)[:300]}). Restore it with `dvc "
            "checkout --force` or `dvc pull --force`, or run `dvc repro finetune`."
        ) from error
