"""Benchmarks run as their documentation says, on tables and models too small to measure anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from benchmarks import inference, measuring, memory, training
from benchmarks.draw import draw, grouped, read_results
from benchmarks.measuring import StepClock, floor_share
from benchmarks.published import RECIPES, WORD, default_recipe, make_recipe_trainer
from benchmarks.shapes import SHAPES, entered_project, linear_parameters, save_random_base, shape_config
from benchmarks.stages import STAGES, exponent
from benchmarks.workloads import FIRST_TOKEN, TERMINATOR, make_labels, make_prompts, make_rows, mean_tokens
from preflight.memory import GIB
from preflight.throughput import measured_shape, measurements
from stages.common.base import BASE_FOLDER
from stages.common.errors import UserError
from stages.common.model import load_model
from stages.common.scoring.label_scores import build_tree
from tests.printed import printed_rows
from tests.tiny import CONTROL_TOKENS

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmark_of_comparisons_prints_a_line_for_each_task() -> None:
    lines = printed_rows("benchmarks.compare", "--rows", "200", "--tasks", "2 labels")
    assert [line[0] for line in lines] == ["2 labels"]
    assert all(float(line[4]) < 1024 for line in lines)


def test_the_benchmark_of_stages_prints_a_line_for_each_cheap_stage() -> None:
    lines = printed_rows("benchmarks.stages", "--rows", "300")
    assert [line[0] for line in lines] == list(STAGES)
    assert all(float(line[2]) > 0 and float(line[4]) < 1024 for line in lines)


def test_growth_is_the_power_of_the_number_of_rows() -> None:
    assert exponent(100, 2.0, 1_000, 20.0) == pytest.approx(1)
    assert exponent(100, 2.0, 400, 32.0) == pytest.approx(2)


Results = tuple[list[dict[str, Any]], list[list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Results]:
    """Runs a benchmark of speed on the CPU; its rows of JSON, and its Markdown table's."""

    def run_benchmark(benchmark: ModuleType, *options: str) -> Results:
        path = tmp_path / "results.json"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--shapes", "tiny", "--json", str(path), *options])
        benchmark.main()
        lines = capsys.readouterr().out.splitlines()
        table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        assert len(lines) == 2 + len(table), "the table alone, and what it was measured with"
        return read_results(path), table

    return run_benchmark


def test_the_training_benchmark_compares_the_recipes_with_this_project(run: Callable[..., Results]) -> None:
    rows, table = run(training, "--steps", "3", "--warmup-steps", "2")
    assert [(row["system"], row["rows"]) for row in rows] == [
        ("arxiv-topics", 16), ("slr-screening", 8), ("trl-defaults", 8), ("this project", 8)
    ]  # fmt: skip
    for row, cells in zip(rows, table[2:], strict=True):
        trained = make_rows(make_prompts(5 * row["rows"], 45, 512), make_labels(5, 512))
        assert row["tokens_per_second"] == pytest.approx(row["examples_per_second"] * mean_tokens(trained))
        assert 46 < mean_tokens(trained) < 50, "45 tokens of prompt, 2 to 5 of label and terminator"
        assert row["times_first"] == pytest.approx(row["examples_per_second"] / rows[0]["examples_per_second"])
        assert cells[:4] == ["tiny, 45 tokens", "random", row["system"], str(row["rows"])]
        assert row["versions"]["trl"] and row["device"].startswith("cpu") and row["compute_dtype"] == "float32"


def test_the_inference_benchmark_compares_generating_with_scoring(run: Callable[..., Results]) -> None:
    rows, table = run(inference, "--rows", "154", "--shared-prefix", "20")
    assert [(row["system"], row["labels"], row["rows"]) for row in rows] == [
        ("pipeline", None, 16), ("batched generate", None, 154),
        ("each label by itself", 5, 30), ("each label by itself", 77, 2),
        ("this project", 5, 154), ("this project", 77, 154),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(45 * row["examples_per_second"])
        assert row["times_first"] == pytest.approx(row["examples_per_second"] / rows[0]["examples_per_second"])
    assert [cells[0] for cells in table[-2:]] == ["tiny, 45 tokens, 5 labels", "tiny, 45 tokens, 77 labels"]


def test_the_benchmark_of_memory_prints_a_line_that_the_plan_can_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["memory", "--stage", "infer", "tiny:45:4:8"])
    memory.main()
    [line] = capsys.readouterr().out.splitlines()
    scored = json.loads(line)
    with entered_project("tiny", None):
        trained = {**scored, **memory.train("tiny", 45, 4, 8)}
    for row, kind in ((scored, "scoring"), (trained, "training")):
        assert set(row) == set(measurements()[0]) and (row["kind"], row["device"]) == (kind, "cpu")
        assert row["packed"] and row["rows"] == 8 and measured_shape(row).hidden == 64
        # Python with torch takes some 0.5 GiB; less would be a part of it, more what making the base took.
        assert 0.3 * GIB < row["process_bytes"] < 2 * GIB
    assert scored["tokens_per_second"] is None and trained["tokens_per_second"] > 0


def test_shapes_have_the_parameters_of_the_published_models() -> None:
    # The totals that the model cards on the Hub give; layers x (queries and output, keys and values, MLP) by hand.
    expected = {
        "llama-3.2-1b": (1_235_814_400, 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)),
        "llama-3.2-3b": (3_212_749_824, 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)),
        "smollm2-135m": (134_515_008, 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)),
    }
    assert expected["llama-3.2-1b"][1] == 973_078_528
    for name in SHAPES:
        config = shape_config(name)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
        assert linear_parameters(config) == sum(module.weight.numel() for module in linear)
        if name in expected:
            assert (model.num_parameters(), linear_parameters(config)) == expected[name]


def test_the_floor_is_four_flop_for_a_trained_weight_and_token_and_two_for_a_scored_one() -> None:
    # 790e12 / (4 x 973,078,528 x 387) = 524.46 examples/s, and twice that when scoring.
    at_the_floor = 387 * 524.455
    assert floor_share("training", 973_078_528, at_the_floor, 790e12) == pytest.approx(1, rel=1e-5)
    assert floor_share("inference", 973_078_528, at_the_floor, 790e12) == pytest.approx(0.5, rel=1e-5)
    assert floor_share("training", 973_078_528, at_the_floor, None) is None


def test_the_clock_counts_from_the_end_of_a_step_to_the_end_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = iter([100.0, 107.0, 108.0, 110.0, 113.0])
    monkeypatch.setattr(measuring.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(times))
    clock = StepClock()
    for _ in range(5):
        clock.on_step_end(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl())
    # The first step has no beginning; 7 s are the second one, which is still warm-up.
    assert clock.median_seconds(warmup_steps=2) == 2


def test_prompts_have_the_mean_length_and_begin_alike() -> None:
    prompts = make_prompts(1_000, 387, 512, shared_prefix=100)
    lengths = [len(prompt) for prompt in prompts]
    assert sum(lengths) == 387 * 1_000
    assert (min(lengths), max(lengths)) == (387 - 96, 387 + 96)
    assert len({tuple(prompt[:100]) for prompt in prompts}) == 1
    assert len({tuple(prompt[100:110]) for prompt in prompts}) == 1_000
    assert min(map(min, prompts)) >= FIRST_TOKEN > len(CONTROL_TOKENS)
    assert {len(prompt) for prompt in make_prompts(7, 45, 512, equal_lengths=True)} == {45}
    with pytest.raises(UserError, match="--shared-prefix: 34 tokens do not fit"):
        make_prompts(1_000, 45, 512, shared_prefix=34)


def test_labels_differ_and_form_a_tree() -> None:
    for count in (5, 77):
        labels = list(make_labels(count, 49_152).values())
        assert len({tuple(ids) for ids in labels}) == count
        assert {len(ids) for ids in labels} <= {2, 3, 4, 5}
        assert all(ids[-1] == TERMINATOR for ids in labels)
        assert len({ids[0] for ids in labels}) <= count // 2 + 1
        assert len(build_tree(labels).tokens) < sum(len(ids) - 1 for ids in labels)


@pytest.fixture
def project() -> Any:
    with entered_project("tiny", None):
        yield


def test_published_recipes_are_set_as_published(project: None) -> None:
    rows = make_rows([[40, 41, 42], [43, 44]] * 8, {"label 0": [50, TERMINATOR]})
    for recipe, expected in (
        (RECIPES["arxiv-topics"], (8, 2, 16, [40, 41, 42, 50, TERMINATOR])),
        (RECIPES["slr-screening"], (2, 4, 32, [40, 41, 42, 50, TERMINATOR])),
        (default_recipe(4, 24), (8, 3, 4, [-100, -100, -100, 50, TERMINATOR])),
    ):
        trainer: Any = make_recipe_trainer(recipe, rows, 1, "run")
        args, learned = trainer.args, trainer.train_dataset[0]["labels"]
        rank = trainer.model.peft_config["default"].r
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, rank, learned) == expected
        assert args.gradient_checkpointing and args.packing is False


def test_the_adapter_changes_what_the_base_computes(project: None) -> None:
    inference.save_adapter()
    ids = torch.tensor([[40, 41, 42]])
    with torch.inference_mode():
        adapted, base = (load_model(folder)(input_ids=ids).logits for folder in (Path("models/adapter"), None))
    assert (adapted - base).abs().max() > 1e-3


def test_the_pipelines_text_has_as_many_tokens_as_the_prompt(project: None) -> None:
    assert len(AutoTokenizer.from_pretrained(str(BASE_FOLDER))(WORD * 387)["input_ids"]) == 387


def test_a_real_base_is_used_for_its_shape_alone(tmp_path: Path, base_folder: Path) -> None:
    save_random_base("tiny", tmp_path / "mine")
    with entered_project("tiny", tmp_path / "mine") as weights:
        assert weights == "real"
        assert (BASE_FOLDER / "model.safetensors").resolve() == tmp_path / "mine/model.safetensors"
    with entered_project("tiny", base_folder) as weights:  # of 400 tokens, not 512
        assert weights == "random"
    with pytest.raises(UserError, match="holds no config"), entered_project("tiny", tmp_path):
        pass


def test_the_drawing_has_a_bar_for_each_system_and_a_decade_is_as_long_everywhere(tmp_path: Path) -> None:
    row = {"benchmark": "inference", "shape": "tiny", "prompt_tokens": 45, "device": "cpu <x>"}
    measured = [("pipeline", None, 5.0), ("this project", 5, 10.0), ("this project", 77, 1000.0), ("pipeline", None, 1)]
    lines = [row | {"system": name, "labels": labels, "examples_per_second": rate} for name, labels, rate in measured]
    path = tmp_path / "results.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    groups = grouped(read_results(path))
    assert groups == {
        "inference: tiny, 45 tokens; cpu <x>": {
            "pipeline": 1,
            "this project, 5 labels": 10,
            "this project, 77 labels": 1000,
        }
    }
    svg = ElementTree.fromstring(draw(groups))
    lengths = [float(bar.attrib["width"]) for bar in svg.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert lengths[0] > 0
    assert lengths[2] - lengths[1] == pytest.approx(2 * (lengths[1] - lengths[0]), abs=0.3)
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="something else than rows"):
        read_results(path)
