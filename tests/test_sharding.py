"""A base model whose layers are sharded over two processes computes what one computes that is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM

from stages.common.model import load_base
from stages.common.sharding import base_bytes, is_spread, laid_out, parts_absent, skeleton
from tests.launched import finish, start_two
from tests.test_label_scores import SHAPE
from tests.workplace import ENVIRONMENT, Workplace

# Of each kind what another one lacks: biases, tied embeddings, experts in one tensor, windows, other names of layers, a
# layer 10.
KINDS = {
    "llama": {"tie_word_embeddings": True, "num_hidden_layers": 3},
    "qwen2": {"num_hidden_layers": 11},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "gpt2": {},
}
# Run in two processes: what a training step on each base comes to, and how many bytes of the layers a process holds.
STEP = """
import json, os, pathlib
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from stages.common import model as loading
from stages.common.acceleration.base import trained_and_all_parameters
from stages.common.errors import run_stage
from stages.common.processes import gathered, joined_processes, leads
from stages.common.sharding import is_sharded

IDS = torch.arange(3, 63).view(2, 30)

def held(weight):
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    assert local.device.type == "cpu"
    return local.untyped_storage().nbytes()

def step(folder, shard):
    os.environ["SHARD_BASE"] = shard
    loading.BASE_FOLDER, loading.ensure_base = folder, lambda: folder
    base = loading.load_base(trains=True)
    assert is_sharded(base) == (shard == "1")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)  # zeros would leave no gradient in the other matrix
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [weight.grad.norm().item() for weight in model.parameters() if weight.requires_grad]
    in_layers = sum(held(weight) for name, weight in base.named_parameters() if ".layers." in name or ".h." in name
                    if not weight.requires_grad)
    return {"loss": loss.item(), "gradients": gradients, "layers": in_layers,
            "parameters": trained_and_all_parameters(model)}

def main():
    with joined_processes():
        for folder in sorted(path.parent for path in pathlib.Path().glob('*/config.json')):
            whole, sharded = gathered(step(folder, "0")), gathered(step(folder, "1"))
            if leads():
                print(json.dumps([folder.name, whole, sharded]), flush=True)

run_stage(main)
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bases with random weights."""
    folder = tmp_path_factory.mktemp("bases")
    for kind, settings in KINDS.items():
        config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    return folder


def test_layers_of_every_kind_are_shared_evenly_and_train_to_the_very_same_numbers(bases: Path) -> None:
    (bases / "step.py").write_text(STEP)
    said = finish(start_two(Workplace(bases), "step", **ENVIRONMENT))
    results = [json.loads(line) for line in said.splitlines() if line.startswith('["')]
    assert {kind for kind, *_ in results} == {*KINDS}
    for kind, whole, sharded in results:
        for process in (0, 1):
            assert 0 < sharded[process].pop("layers") == whole[process].pop("layers") / 2, kind
        assert sharded == whole, kind


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_lays_whole_layers_on_both_gpus_in_their_order_and_the_rest_on_the_first(
    bases: Path, kind: str
) -> None:
    model = skeleton(bases / kind, torch.bfloat16)
    devices = laid_out(model, 2)
    inside, outside = list[torch.device](), list[torch.device]()
    for weight, _ in model.named_parameters():
        [place] = [device for name, device in devices.items() if weight.startswith(f"{name}.")]
        (inside if ".layers." in weight or ".h." in weight else outside).append(place)
    assert inside == sorted(inside, key=str)
    assert inside[-1] == torch.device("cuda", 1)
    assert {*outside} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_the_size_of_a_base_is_known_before_it_is_loaded(
    bases: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.common.model.BASE_FOLDER", bases / kind)
    monkeypatch.setattr("stages.common.model.ensure_base", lambda: bases / kind)
    loaded = load_base()
    scales = 0
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            scales += state.absmax.nbytes + state.state2.absmax.nbytes
    expected = base_bytes(skeleton(bases / kind, torch.float32))
    # Blocks of 256 scales are less than full in matrices this small.
    assert sum(weight.nbytes for weight in loaded.parameters()) + scales == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("gpus", "memory", "wanted", "spread"),
    [(2, 1.5, None, False), (2, 1.4, None, True), (1, 1.4, None, False), (2, 1.4, "0", False), (2, 9.0, "1", True)],
)
def test_a_base_is_spread_where_a_gpu_could_not_hold_it(
    bases: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, memory: float, wanted: str | None, spread: bool
) -> None:
    monkeypatch.setenv("SHARD_BASE", wanted or "")
    size = base_bytes(skeleton(bases / "llama", torch.bfloat16))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: SimpleNamespace(total_memory=memory * size))
    assert is_spread(bases / "llama", torch.bfloat16, gpus) == spread


def test_what_was_in_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "no")
    before = dict(os.environ)
    with parts_absent():
        assert dict(os.environ) != before
    assert dict(os.environ) == before
