"""Loading the base as it is trained: the same numbers whichever CPU there is and whatever was run before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from stages.common.model import load_base
from tests.workplace import make_workplace

IDS = torch.tensor([[5, 6, 7, 8, 9], [40, 41, 42, 43, 44]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny base in NF4."""
    place = make_workplace(tmp_path_factory.mktemp("model") / "project")
    assert place.main("stages.base_model") == 0
    with place.entered():
        yield load_base()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_evaluating_leaves_the_quantised_weights_as_they_were(model: Any) -> None:
    # Only a CPU with AVX512-BF16 can fail here: bitsandbytes repacks the weights there, and loses digits.
    before = logits(model.train())
    evaluated = logits(model.eval())
    assert torch.equal(logits(model.train()), before)
    torch.testing.assert_close(evaluated, before, rtol=1e-5, atol=1e-6)


def test_a_layer_multiplies_by_its_dequantised_weights_in_float32_for_one_token_and_for_many(model: Any) -> None:
    layer = model.eval().model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.quant_state).float()
    torch.manual_seed(0)
    for rows in (1, 3, 40):
        inputs = torch.randn(1, rows, weight.shape[1])
        with torch.no_grad():
            torch.testing.assert_close(layer(inputs), inputs @ weight.T, rtol=1e-5, atol=1e-5)
