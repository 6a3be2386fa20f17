"""Predictions of memory, time and cost: beside what was measured, and what the command says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import SHAPES, shape_config
from preflight.memory import GIB, Run, activation_bytes, process_bytes, training_terms, weights_terms
from preflight.predicting import Prediction, generated_batch, prediction_bytes, prediction_terms, scored_batch
from preflight.shapes import Shape, read_shape, shape_of_file
from preflight.throughput import MACHINES, machine_of_device, measured_shape, measurements, predict_rate
from stages.common.acceleration.attention import Rows
from stages.common.acceleration.choice import FastPaths
from stages.common.acceleration.preparing import prepare_layers
from stages.common.scoring.batches import TOKENS_PER_BATCH
from stages.common.scoring.packed_scores import _tokens_of_logits, deal, score_packed
from stages.common.sharding import _bytes, base_bytes, laid_out, skeleton
from stages.common.switches import AUTOMATIC
from stages.common.training.collating import MULTIPLE_OF_ANSWERS, MULTIPLE_OF_TOKENS, round_up
from tests.launched import finish, start_two
from tests.live_bytes import LiveBytes
from tests.split_files import prompt_format, write_split
from tests.workplace import ENVIRONMENT, ROOT, Workplace, make_workplace

WITHIN = 0.15
# As the published config.json of a base of 70 B parameters has them.
LARGE = {
    "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
# Run in two processes: bytes of weights and of their scales that the first one holds.
HELD = """
import os, pathlib
from bitsandbytes.nn import Linear4bit
from stages.common import model as loading
from stages.common.errors import run_stage
from stages.common.processes import joined_processes, leads

def main():
    os.environ["SHARD_BASE"], loading.BASE_FOLDER = "1", pathlib.Path("base")
    loading.ensure_base = lambda: loading.BASE_FOLDER
    with joined_processes():
        layers = [one for one in loading.load_base(trains=True).modules() if isinstance(one, Linear4bit)]
        held = [one.weight.to_local() for one in layers] + [one.quant_state.absmax for one in layers]
        held += [one.quant_state.state2.absmax for one in layers]
        if leads():
            print("held:", sum(tensor.untyped_storage().nbytes() for tensor in held), flush=True)

run_stage(main)
"""
MEASURED = [row for row in measurements() if row["process_bytes"] and row["kind"] == "training"]
PREDICTED = [row for row in measurements() if row["process_bytes"] and row["kind"] != "training"]


def named(row: dict[str, Any]) -> str:
    return f"{row['device']}-{row['base']}-{row['rows']}x{row['mean_tokens']:.0f}-r{row['rank']}-{row['command'][:60]}"


def measured_run(row: dict[str, Any]) -> Run:
    tokens, answers = round(row["rows"] * row["mean_tokens"]), round(row["rows"] * row["mean_answers"])
    if row["packed"]:
        tokens, answers = round_up(tokens, MULTIPLE_OF_TOKENS), round_up(answers, MULTIPLE_OF_ANSWERS)
    return Run(
        device=MACHINES[row["device"]].device,
        rank=row["rank"],
        optimizer="adamw_torch",
        tokens=tokens if row["packed"] else row["rows"] * row["longest"],
        answers=answers,
        accumulates=row["accumulation"] > 1,
        many_shapes=row["recordings"] > 1,
        **{name: row[name] for name in ("recomputed", "packed", "dense", "compiled", "recorded")},
    )


def measured_prediction(row: dict[str, Any]) -> Prediction:
    shape, device = measured_shape(row), MACHINES[row["device"]].device
    scores, length, behind = row["kind"] == "scoring", row["longest"], row["mean_answers"]
    if scores:
        rows, tokens = scored_batch(
            shape, device, TOKENS_PER_BATCH[device], row["rows"], length, length, behind, packed=row["packed"]
        )
    else:
        rows, tokens = generated_batch(TOKENS_PER_BATCH[device], row["rows"], length, behind)
    return Prediction(
        device, row["rank"], rows, tokens, 1 + behind * scores, behind * (not scores), row["packed"], row["dense"]
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def test_at_least_six_measured_configurations_are_compared() -> None:
    assert sum(row["peak_bytes"] is not None for row in MEASURED) >= 6


def test_predicted_tensors_are_on_average_within_3_percent() -> None:
    # A bound of 15 % alone would not notice a term that is missing.
    off = [
        abs(sum(training_terms(measured_shape(row), measured_run(row)).values()) / row["peak_bytes"] - 1)
        for row in MEASURED
        if row["peak_bytes"] is not None
    ]
    assert sum(off) / len(off) < 0.03


@pytest.mark.parametrize("row", MEASURED, ids=named)
def test_predicted_memory_is_within_15_percent_of_measured(row: dict[str, Any]) -> None:
    shape, run = measured_shape(row), measured_run(row)
    if row["peak_bytes"] is not None:
        assert sum(training_terms(shape, run).values()) == pytest.approx(row["peak_bytes"], rel=WITHIN)
    assert process_bytes(shape, run) == pytest.approx(row["process_bytes"], rel=WITHIN)


@pytest.mark.parametrize("row", PREDICTED, ids=named)
def test_predicted_memory_of_infer_is_within_15_percent_of_measured(row: dict[str, Any]) -> None:
    shape, batch = measured_shape(row), measured_prediction(row)
    if row["peak_bytes"] is not None:
        assert sum(prediction_terms(shape, batch).values()) == pytest.approx(row["peak_bytes"], rel=WITHIN)
    assert prediction_bytes(shape, batch) == pytest.approx(row["process_bytes"], rel=WITHIN)


@pytest.mark.parametrize(("prompts", "nodes"), [(5, 3), (500, 13), (500, 400)])
def test_planned_batches_are_those_that_labels_are_scored_in(prompts: int, nodes: int) -> None:
    config = shape_config("tiny")
    config.vocab_size = 49_152
    shape = read_shape(config.to_dict(), "")
    rows, tokens = scored_batch(shape, "cpu", 2_048, prompts, 45, 45, nodes, packed=True)
    cost = max(45 + nodes, _tokens_of_logits(LlamaForCausalLM(config), 1 + nodes, 2_048))
    assert rows == max(map(len, deal(np.full(prompts, cost), 2_048)))
    assert tokens == rows * (45 + nodes)


def test_a_base_takes_as_much_as_the_stage_thinks_when_it_decides_whether_to_spread_it() -> None:
    for name in ("tiny", "llama-3.2-1b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(name), dtype=torch.bfloat16)
        assert read_shape(shape_config(name).to_dict(), name).quantized_bytes == pytest.approx(base_bytes(model))


def test_a_process_holds_as_much_of_a_sharded_base_as_planned(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(shape_config("tiny")).save_pretrained(tmp_path / "base")
    (tmp_path / "held.py").write_text(HELD)
    said = finish(start_two(Workplace(tmp_path), "held", **ENVIRONMENT))
    planned = weights_terms(shape_of_file(tmp_path / "base"), 4, dense=False, shards=2)
    assert float(re.search(r"held: (\d+)", said)[1]) == pytest.approx(planned["NF4 weights, 1/2 of them"], rel=0.01)  # type: ignore[index]


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("tokens", [256, 1_024])
def test_predicted_activations_are_what_the_graph_holds_of_a_real_model(tokens: int, rank: int) -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))
    prepare_layers(base, FastPaths(None, "", "", ""))
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 512, (1, tokens))
    positions = torch.arange(tokens // 4).repeat(4)[None]
    layout = Rows(torch.arange(0, tokens + 1, tokens // 4, dtype=torch.int32), tokens)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(
            input_ids=ids, position_ids=positions, kept=torch.tensor([tokens - 1]), layout=layout, use_cache=False
        )
    assert output.logits.requires_grad
    run = Run("cpu", rank, "adamw_torch", tokens, 1, False, False, True, False, False, False, False)
    assert activation_bytes(read_shape(config.to_dict(), ""), run) == pytest.approx(sum(kept.values()), rel=0.05)


@pytest.mark.parametrize("inner", [768, 2_048])
def test_predicted_activations_of_scoring_are_what_lives_in_a_real_model(inner: int) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=inner, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prepare_layers(model, FastPaths(None, None, "", ""))
    rows, prompt = 8, 387
    prompts = [[first, *range(prompt - 1)] for first in range(rows)]
    nodes = 2  # [5] and [6], behind which the labels end
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        score_packed(model, prompts, [[5, 2], [6, 2]], 100_000, lambda _rows: None)
    batch = Prediction("cpu", 16, rows, rows * (prompt + nodes), 1 + nodes, 0, packed=True, dense=True)
    terms = prediction_terms(read_shape(config.to_dict(), ""), batch)
    assert terms["activations or logits"] == pytest.approx(live.most, rel=0.08)


def test_parameters_are_counted_as_the_models_have_them() -> None:
    config = shape_config("tiny")
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    shape = read_shape(config.to_dict(), "tiny")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(8) == trained
    linear = sum(parameter.numel() for name, parameter in model.named_parameters() if "base_layer" in name)
    assert shape.linear_parameters == linear


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_measured_configuration_is_as_fast_as_measured_and_twice_the_weights_half_as_fast() -> None:
    row = next(row for row in MEASURED if row["base"] == "llama-3.2-1b" and row["recorded"] and row["rows"] == 32)
    shape, tokens = measured_shape(row), round(row["rows"] * row["mean_tokens"])
    rate = predict_rate("training", shape, MACHINES["H200"], tokens, recomputed=False, dense=True, compiled=False)
    assert rate.tokens_per_second == row["tokens_per_second"]
    doubled = shape._replace(layers=2 * shape.layers)
    slower = predict_rate("training", doubled, MACHINES["H200"], tokens, recomputed=False, dense=True, compiled=False)
    assert slower.tokens_per_second == pytest.approx(rate.tokens_per_second / 2, rel=0.35)
    assert "by arithmetic" in slower.origin and "by arithmetic" not in rate.origin


def test_every_measurement_names_hardware_versions_and_a_command() -> None:
    for row in measurements():
        assert row["device"] in MACHINES and row["versions"]["torch"]
        assert "python -m" in row["command"] or "dvc repro" in row["command"]
        assert row["tokens_per_second"] or row["process_bytes"]


@pytest.mark.parametrize(
    ("device", "gigabytes", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 42, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85, "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", 85, "A100-80GB"),
        ("cuda (NVIDIA H200)", 150, "H200"),
        ("NVIDIA GeForce RTX 4090", 25, "RTX-4090"),
        ("NVIDIA L40S", 48, "L40S"),
        ("NVIDIA GH200 480GB", 100, None),
        ("cpu (x86_64)", 0, "cpu"),
    ],
)
def test_a_gpu_is_known_by_its_name_and_its_memory(device: str, gigabytes: int, expected: str | None) -> None:
    assert machine_of_device(device, gigabytes * 1e9) == expected


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path)


Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(place: Workplace, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs the command in the workplace; its exit code, and all that it says."""

    def run(*options: str, **environment: str) -> tuple[int, str]:
        code = place.main(
            "preflight.plan", *options, **{**dict.fromkeys((*AUTOMATIC, "LOW_MEMORY"), ""), **environment}
        )
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


TOLD = ("--rows", "20000", "--tokens", "390")


def test_a_run_that_fits_is_said_to_fit_with_its_time_and_cost(place: Workplace, say: Say) -> None:
    place.set("format_prompts.max_length_tokens", 500)
    place.set("finetune.max_steps", 3_600)
    place.set("finetune.evaluate_every_steps", 3_600)
    code, said = say("--base", "llama-3.2-1b", "--gpu", "h200", *TOLD, "--price-per-hour", "3.5")
    assert code == 0 and "it fits" in said
    seconds = {
        stage: float(value) * {"s": 1, "min": 60, "h": 3600}[unit]
        for stage, value, unit in re.findall(r"(finetune|together): ([\d.]+) (s|min|h)\b", said)
    }
    # 3,600 steps of 16 rows, and 2,500 rows of validation at half of the price.
    assert seconds["finetune"] == pytest.approx((3_600 * 16 + 2_500 / 2) * 390 / 100_361, rel=0.5)
    cost = float(re.search(r"together: .*?, ([\d.]+) at 3.50", said)[1])  # type: ignore[index]
    assert cost == pytest.approx(seconds["together"] / 3600 * 3.5, rel=0.05)


def test_a_base_that_is_too_large_is_refused_with_what_would_fit(place: Workplace, say: Say) -> None:
    place.write("large/config.json", json.dumps(LARGE))
    code, said = say("--base", "large", "--gpu", "L4", *TOLD)
    assert code == 1 and "Traceback" not in said
    assert "of 22.0 GiB on L4" in said and "a larger GPU (" in said and "H200" in said
    code, said = say("--base", "large/config.json", "--gpu", "H200", *TOLD)
    assert code == 0 and "NF4 weights" in said


def test_more_gpus_are_named_where_the_base_would_fit_sharded_over_them(place: Workplace, say: Say) -> None:
    place.write("large/config.json", json.dumps(LARGE))
    code, said = say("--base", "large", "--gpu", "L40S", *TOLD)
    assert code == 1 and "more GPUs (--gpus 2: the base is then sharded over them)" in said
    code, said = say("--base", "large", "--gpu", "L40S", "--gpus", "2", *TOLD)
    assert code == 0 and "finetune on each of 2 GPUs, which the base is sharded over" in said
    assert "NF4 weights, 1/2 of them" in said and "layers gathered" in said and "activations recomputed" in said
    assert "infer on each of 2 GPUs, which the base's layers lie on" in said
    assert say("--base", "large", "--gpu", "L40S", "--gpus", "2", *TOLD, SHARD_BASE="0")[0] == 1


def test_a_base_that_one_gpu_holds_is_sharded_where_the_environment_asks_for_it(say: Say) -> None:
    options = ("--base", "llama-3.2-1b", "--gpu", "H100", "--gpus", "2", *TOLD)
    assert "dequantised weights" in say(*options)[1] and "sharded" not in say(*options)[1]
    code, said = say(*options, SHARD_BASE="1")
    assert code == 0 and "sharded over" in said and "dequantised" not in said


def test_memory_of_infer_is_of_scored_labels_or_of_generated_answers(place: Workplace, say: Say) -> None:
    options = ("--base", "llama-3.2-3b", "--gpu", "L4", *TOLD)
    code, said = say(*options)
    assert code == 0 and "memory of infer, " in said and "keys and values" not in said
    place.set("infer.method", "generate")
    place.set("infer.max_new_tokens", 32)
    place.set("format_prompts.max_length_tokens", 500)
    code, said = say(*options)
    rows = re.search(r"memory of infer, (\d+) rows", said)
    assert code == 0 and "keys and values" in said and rows is not None
    assert int(rows[1]) == 32_768 // (500 - 4 + 32)


def test_it_says_nothing_but_the_plan() -> None:
    imported = subprocess.run(
        [sys.executable, "-c", "import preflight.plan"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert imported.stdout + imported.stderr == ""


def test_rows_that_are_too_long_are_refused_with_the_length_that_fits(place: Workplace, say: Say) -> None:
    place.set("format_prompts.max_length_tokens", 200_000)
    code, said = say("--base", "llama-3.2-3b", "--gpu", "A10G", *TOLD)
    found = re.search(r"max_length_tokens of at most ([\d,]+)", said)
    assert code == 1 and found is not None
    place.set("format_prompts.max_length_tokens", int(found[1].replace(",", "")))
    assert say("--base", "llama-3.2-3b", "--gpu", "A10G", *TOLD)[0] == 0


def test_a_micro_batch_that_does_not_fit_gives_way_to_a_smaller_one(place: Workplace, say: Say) -> None:
    place.set("finetune.global_batch_size", 64)
    place.set("format_prompts.max_length_tokens", 512)
    code, said = say("--base", "llama-3.2-3b", "--gpu", "A100-40GB", *TOLD)
    assert code == 0
    rows = int(re.search(r"of finetune, (\d+) rows", said)[1])  # type: ignore[index]
    assert rows < 64 and f"MICRO_BATCH_SIZE={rows}" in said
    _, low = say("--base", "llama-3.2-3b", "--gpu", "A100-40GB", *TOLD, LOW_MEMORY="1")
    assert "NF4 weights" in low and "activations recomputed" in low and "dequantised" not in low


def test_split_files_say_how_many_rows_there_are_and_how_long(place: Workplace, say: Say) -> None:
    template = place.params()["format_prompts"]["template"]
    place.set("format_prompts.max_length_tokens", 96)
    footer = prompt_format("classification", {"bad": [7, 2], "so-so": [8, 2], "good": [9, 2]}, ["bad", "so-so", "good"])
    footer |= {"style": "plain", "system": None, "template": template}
    for part, rows in (("train", 30), ("validation", 4), ("test", 4)):
        found = [
            {"text": f"{part} {number}", "label": "bad", "prompt_ids": [5] * (9 + number % 3), "completion_ids": [7, 2]}
            for number in range(rows)
        ]
        write_split(place.folder / f"data/splits/{part}.parquet", footer, found)
    code, said = say("--base", "tiny")
    assert code == 0 and "30 rows of 12 tokens, 13 at most; 1 x cpu" in said
    code, said = say("--base", "tiny", *TOLD)
    assert code == 0 and "20,000 rows of 390 tokens" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--base", "tiny", "--gpu", "H900", *TOLD), "'H900' is not known. Allowed: H200, H100"),
        (("--base", "tiny", "--gpus", "3", *TOLD), "3 processes (one for each GPU) cannot share the 16 rows"),
        (("--base", "tiny", "--gpus", "2", "--gpu", "cpu", *TOLD), "processes on one CPU share its cores"),
        (("--base", "tiny"), "give --rows (of train) and --tokens (mean of a row)"),
        (("--base", "tiny", "--rows", "20"), "--rows needs --tokens as well"),
        (("--base", "nowhere", *TOLD), "'nowhere' is no file. Allowed: llama-3.2-1b"),
        (("--base", "broken.json", *TOLD), "broken.json: does not describe a decoder"),
        (("absent.yaml", "--base", "tiny", *TOLD), "absent.yaml: not found"),
        (TOLD, "models/base/config.json: not found"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_message(
    place: Workplace, say: Say, options: tuple[str, ...], expected: str
) -> None:
    place.write("broken.json", json.dumps({"hidden_size": 5}))
    code, said = say(*options)
    assert code == 1 and expected in said and "Traceback" not in said


def test_a_price_below_zero_is_no_price(say: Say) -> None:
    code, said = say("--base", "tiny", *TOLD, "--price-per-hour", "-1")
    assert code == 2 and "--price-per-hour must be a number above 0" in said


def test_shapes_have_the_size_that_their_names_say() -> None:
    billions = {name: read_shape(shape_config(name).to_dict(), name) for name in SHAPES if name != "tiny"}
    sizes = {name: shape.linear_parameters + shape.vocabulary * shape.hidden for name, shape in billions.items()}
    assert {name: f"{size / 1e9:.3g}" for name, size in sizes.items()} == {
        "llama-3.2-1b": "1.24", "llama-3.2-3b": "3.21", "smollm2-135m": "0.134",
    }  # fmt: skip
    assert GIB == 1024**3 and isinstance(billions["llama-3.2-1b"], Shape)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_what_the_fullest_gpu_holds_of_layers_on_all_of_them_is_as_planned(tmp_path: Path, gpus: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    model = skeleton(tmp_path, torch.bfloat16)
    held: Counter[torch.device] = Counter()
    for name, device in laid_out(model, gpus).items():
        held[device] += round(_bytes(model.get_submodule(name), model))
    batch = Prediction("cuda", 16, rows=1, tokens=1, logits=1, new_tokens=0, packed=False, dense=False, gpus=gpus)
    planned = prediction_terms(shape_of_file(tmp_path), batch)["weights, embeddings among them"]
    assert planned == pytest.approx(max(held.values()), rel=0.05)


@pytest.mark.parametrize("rows", ["1", "2"])
@pytest.mark.parametrize("tokens", ["1", "50"])
def test_the_smallest_data_have_a_plan(say: Say, rows: str, tokens: str) -> None:
    code, said = say("--base", "smollm2-135m", "--gpu", "H100", "--rows", rows, "--tokens", tokens)
    assert code == 0 and "-" not in said.split("infer: ")[1].split(" s")[0]


def test_what_a_sharded_base_cannot_have_is_refused_by_the_plan_too(place: Workplace, say: Say) -> None:
    options = ("--base", "smollm2-135m", "--gpu", "H100", "--gpus", "2", *TOLD)
    for name in ("DENSE_BASE", "COMPILE_LAYERS", "RECORD_STEPS"):
        code, said = say(*options, SHARD_BASE="1", **{name: "1"})
        assert code == 1 and f"error: {name}=1 in the environment" in said and "the base is sharded" in said
    place.set("finetune.lora.use_dora", True)
    code, said = say(*options, SHARD_BASE="1")
    assert code == 1 and "error: finetune.lora.use_dora: starts from the norms" in said


def test_a_base_that_fits_sharded_over_the_gpus_that_there_are_is_said_to(place: Workplace, say: Say) -> None:
    place.write("large/config.json", json.dumps(LARGE))
    place.set("format_prompts.max_length_tokens", 20_000)
    options = ("--base", "large", "--gpu", "H100", "--gpus", "2", "--rows", "1000", "--tokens", "20000")
    code, said = say(*options)
    assert code == 1 and "the base sharded over these GPUs (SHARD_BASE=1 in the environment)" in said
    assert say(*options, SHARD_BASE="1")[0] == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"num_local_experts": 8}, "mixture of experts"), ({"num_hidden_layers": 0}, "does not describe a decoder")],
)
def test_a_base_that_cannot_be_planned_is_refused(
    place: Workplace, say: Say, change: dict[str, int], expected: str
) -> None:
    place.write("large/config.json", json.dumps(LARGE | change))
    code, said = say("--base", "large", "--gpu", "H200", *TOLD)
    assert code == 1 and expected in said and "Traceback" not in said
