"""Fast paths: chosen by what is possible and pays, switched by the environment, and of the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model

from stages.common.acceleration.attention import Rows
from stages.common.acceleration.base import dequantize_base, linear_parameters
from stages.common.acceleration.choice import (
    LEAST_COMPILED_FLOP,
    choose_paths,
    forward_flop,
    packing_obstacle,
)
from stages.common.errors import UserError
from stages.common.model import load_base
from stages.common.scoring.loading import load_fast_model
from stages.common.scoring.tree_attention import merge
from stages.common.switches import SWITCHES, low_memory
from tests.test_label_scores import tiny_model
from tests.workplace import Workplace, make_workplace

IDS = torch.tensor([[5, 6, 7, 8, 9], [40, 41, 42, 43, 44]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    project = make_workplace(tmp_path_factory.mktemp("acceleration") / "project")
    assert project.main("stages.base_model") == 0
    return project


@pytest.fixture
def base(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tiny base in NF4, and an environment without switches."""
    for name in (*SWITCHES, "LOW_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    with place.entered():
        yield load_base()


# --- the choice -------------------------------------------------------------------------------------------------------


def test_every_path_is_taken_or_the_line_for_the_log_says_why_not(base: Any) -> None:
    paths = choose_paths(base, 0, trains=True)
    said = str(paths)
    assert said.startswith("fast paths: ")
    for what, reason in zip(SWITCHES.values(), paths, strict=True):
        assert (what in said.split(";")[0]) == (reason is None)
        assert reason is None or f"not {what}: {reason}" in said
    assert paths.recorded == paths.compiled == "there is no GPU"


@pytest.mark.parametrize("name", ["PACK_ROWS", "DENSE_BASE", "COMPILE_LAYERS"])
def test_each_path_can_be_taken_and_left_by_its_switch(base: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    index = list(SWITCHES).index(name)
    monkeypatch.setenv("PACK_ROWS", "1")
    monkeypatch.setenv(name, "1")
    assert choose_paths(base, 0, trains=True)[index] is None
    monkeypatch.setenv(name, "0")
    assert choose_paths(base, 0, trains=True)[index] == f"{name}=0"


def test_a_switch_that_asks_for_the_impossible_is_refused(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECORD_STEPS", "1")
    with pytest.raises(UserError, match=r"RECORD_STEPS=1 .* steps recorded, which cannot be had: there is no GPU"):
        choose_paths(base, 0, trains=True)
    monkeypatch.delenv("RECORD_STEPS")
    monkeypatch.setenv("PACK_ROWS", "0")
    monkeypatch.setenv("COMPILE_LAYERS", "1")
    with pytest.raises(UserError, match=r"COMPILE_LAYERS=1 .* it needs rows without padding"):
        choose_paths(base, 0, trains=True)


@pytest.mark.parametrize("name", [*SWITCHES, "LOW_MEMORY"])
def test_a_switch_is_0_or_1(base: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(UserError, match=f"{name}=yes in the environment: 0 turns it off, 1 on"):
        choose_paths(base, 0, trains=True)
        low_memory()


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gemma2", {}, "gemma2 is not among llama"),
        ("mistral", {"sliding_window": 16}, "do not see all of a row"),
        ("llama", {"attention_dropout": 0.1}, "dropout in its attention"),
    ],
)
def test_models_whose_attention_is_another_are_not_packed(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    assert reason in (packing_obstacle(tiny_model(model_type, **settings)) or "")


def test_work_is_counted_by_the_weights_that_a_token_meets(base: Any) -> None:
    # 2 layers: queries and output 64 x 64, keys and values 64 x 32, gate, up and down 64 x 128.
    assert linear_parameters(base) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert forward_flop(base, 10) == 20 * linear_parameters(base)
    assert forward_flop(base, 1e9) < LEAST_COMPILED_FLOP, "a tiny model is never worth compiling"


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_the_dequantised_base_computes_what_the_quantised_one_does(base: Any) -> None:
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        dequantize_base(base)
        assert not any(isinstance(module, Linear4bit) for module in base.modules())
        torch.testing.assert_close(base(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not base.is_loaded_in_4bit and not hasattr(base.config, "quantization_config")


def test_a_model_for_answers_keeps_its_padding_and_says_why(base: Any) -> None:
    model = load_fast_model(None, 10**9, scores_labels=False)
    assert model.config._attn_implementation == "sdpa"
    assert str(model.fast_paths).count("answers are generated") == 3


def test_attention_over_parts_is_put_together_to_attention_over_all() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("qhd,khd->qhk", q, k[keys])
        return torch.einsum("qhk,khd->qhd", scores.softmax(dim=-1), v[keys]), scores.logsumexp(dim=-1)

    whole, _ = attend(slice(None))
    torch.testing.assert_close(merge(attend(slice(5)), attend(slice(5, 9))), whole)


@pytest.mark.parametrize("modules", ["lm_head", "embed_tokens", "q_proj"])
def test_an_adapter_of_tied_embeddings_is_not_merged_into_both(base: Any, tmp_path: Path, modules: str) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=[modules], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                weight.normal_(std=0.5)
        expected = adapted(input_ids=IDS).logits
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    model = load_fast_model(tmp_path / "adapter", 0, scores_labels=False)
    assert isinstance(model, PeftModel) == (modules != "q_proj")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_2000_tokens_take_no_memory_for_all_pairs_of_them() -> None:
    q, k, v = (torch.randn(2000, heads, 16, requires_grad=True) for heads in (8, 2, 2))
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Rows(torch.tensor([0, 2000], dtype=torch.int32), 2000).attend(q, k, v, 0.25)
    assert saved and max(saved) <= q.numel()
