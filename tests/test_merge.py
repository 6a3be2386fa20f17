"""An adapter merged into its base: the right weights, the adapter's own answers, and no export where they differ."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from serving.export import folder as export_folder
from serving.predictor import load_predictor
from stages.common.model import load_base
from tests.sharp import sharp_model
from tests.test_predict import LABELS, of_kind
from tests.workplace import Workplace, make_workplace

COMMAND = "serving.merge"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project through `finetune`, its adapter far from its base."""
    place = make_workplace(tmp_path_factory.mktemp("merge") / "project")
    sharp_model(place.folder / "base").save_pretrained(place.folder / "base")
    place.set("finetune.learning_rate", 0.02)
    for stage in ("base_model", "ingest", "format_prompts", "split", "finetune"):
        assert place.main(f"stages.{stage}") == 0
    return place


@pytest.fixture
def place(trained: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it."""
    return Workplace(Path(shutil.copytree(trained.folder, tmp_path / "project", symlinks=True)))


def merged(place: Workplace, *arguments: str) -> dict[str, Any]:
    """What parity.json says after a merge."""
    assert place.main(COMMAND, *arguments) == 0
    return json.loads((place.folder / "models/merged/parity.json").read_text())


def refused(place: Workplace, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a merge that fails."""
    capfd.readouterr()
    assert place.main(COMMAND, *arguments) == 1
    [message] = capfd.readouterr().err.split("error: ")[1:]
    assert not list(place.folder.glob("models/.*")), "nothing half-written stays"
    return message


def retrained(place: Workplace, **lora: Any) -> Workplace:
    """The project with another adapter."""
    for name, value in lora.items():
        place.set(f"finetune.lora.{name}", value)
    shutil.rmtree(place.folder / "models/adapter")
    assert place.main("stages.finetune") == 0
    return place


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_weight_is_the_dequantised_one_plus_the_adapters_product_rounded_once(
    place: Workplace, dtype: torch.dtype
) -> None:
    merged(place, "--dtype", str(dtype).removeprefix("torch."))
    base = load_file(place.folder / "base/model.safetensors")
    adapter = load_file(place.folder / "models/adapter/adapter_model.safetensors")
    found = load_file(place.folder / "models/merged/model.safetensors")
    # As `load_base` quantises on a CPU: float32, blocks of 64, scales quantised too.
    packed = quantize_4bit(base[f"{LAYER}.weight"], quant_type="nf4", compress_statistics=True)
    product = adapter[f"base_model.model.{LAYER}.lora_B.weight"] @ adapter[f"base_model.model.{LAYER}.lora_A.weight"]
    expected = dequantize_4bit(*packed) + 32 / 16 * product  # lora.alpha / lora.r
    assert product.abs().max() > 0.01, "the adapter does something"
    assert torch.equal(found[f"{LAYER}.weight"], expected.to(dtype))
    assert torch.equal(found["lm_head.weight"], base["lm_head.weight"].to(dtype)), "which is not quantised"
    assert {weight.dtype for weight in found.values()} == {dtype}


def test_plain_transformers_loads_it_without_bitsandbytes_and_peft(place: Workplace) -> None:
    merged(place)
    code = """if True:
        import sys
        sys.modules["bitsandbytes"] = sys.modules["peft"] = None  # importing them fails
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
        assert not any(report.values()), report
        assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [2]
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
        model.generate(**tokenizer("Review: the fine film\\nOpinion:", return_tensors="pt"), max_new_tokens=2)
    """
    command = [sys.executable, "-c", code, str(place.folder / "models/merged")]
    found = subprocess.run(command, env=place.environment(), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_folder_says_what_it_is_and_what_made_it(place: Workplace) -> None:
    report = merged(place)
    folder = place.folder / "models/merged"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("chat_template.jinja", "prompt.json", "base.json", "provenance.json", "parity.json", "README.md"),
        ]
    )
    for name in ("prompt.json", "base.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (place.folder / "models/adapter" / name).read_bytes()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["merged"]["adapter_sha256"] == export_folder.weights_sha256(place.folder / "models/adapter")
    assert provenance["parameters"]["finetune"]["max_steps"] == 6, "the adapter's own is kept"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert report["rows"] == 12 and report["least_equal"] == 0.995
    assert report["equal"] == {"likeliest label": 1.0, "label by the decision rule (argmax)": 1.0}
    assert 0 < report["mean_probability_difference"] < report["largest_probability_difference"] < 0.05
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj", "up_proj"]}])
def test_variants_of_lora_come_out_right(place: Workplace, lora: dict[str, Any]) -> None:
    # The gate itself compares with the unmerged adapter; here, how closely.
    report = merged(retrained(place, **lora))
    assert min(report["equal"].values()) == 1 and report["largest_probability_difference"] < 0.05


# --- whom it serves ---------------------------------------------------------------------------------------------------


def test_it_answers_as_the_pipeline_does_without_adapter_and_base(place: Workplace) -> None:
    assert place.main("stages.infer") == 0
    predictions = pq.read_table(place.folder / "data/predictions/adapter/test.parquet").to_pydict()
    merged(place)
    for name in ("models/adapter", "models/base"):
        shutil.rmtree(place.folder / name)
    (place.folder / "models/base.json").unlink()
    with place.entered():
        answers = load_predictor("models/merged").predict(pq.read_table("data/splits/test.parquet")["text"].to_pylist())
    assert [answer["label"] for answer in answers] == predictions["prediction"]
    for label in LABELS:
        found = [answer["probabilities"][label] for answer in answers]
        np.testing.assert_allclose(found, predictions[f"probability.{label}"], rtol=0, atol=0.05)
    assert place.main("serving.predict", "--adapter", "models/merged", "--text", "the fine film") == 0


@pytest.mark.parametrize("kind", ["multi_label", "question_answering", "chat"])
def test_every_kind_of_task_is_merged_and_compared(place: Workplace, kind: str) -> None:
    of_kind(place, kind)
    report = merged(place)
    assert min(report["equal"].values()) >= 0.995
    if kind == "multi_label":
        assert list(report["equal"])[1] == "label by the decision rule (thresholds)"
    else:
        assert list(report["equal"]) == ["likeliest next token, along the reference answers"]
        assert report["tokens"] > report["rows"]
        assert report["perplexity_export"] == pytest.approx(report["perplexity_adapter"], rel=0.05)
    with place.entered():
        [answer] = load_predictor("models/merged", max_new_tokens=4).predict(["the fine film"])
    assert ("labels" if kind == "multi_label" else "answer") in answer


def test_the_adapters_own_decision_rule_goes_along_and_is_compared(place: Workplace) -> None:
    thresholds = dict.fromkeys(LABELS, 0.9)
    place.write("models/decision.json", json.dumps({"adapter": {"rule": "thresholds", "thresholds": thresholds}}))
    of_kind(place, "multi_label")
    assert "label by the decision rule (thresholds)" in merged(place)["equal"]
    (place.folder / "models/decision.json").unlink()
    with place.entered():
        [answer] = load_predictor("models/merged").predict(["the fine film"])
    assert answer["thresholds"] == thresholds


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_damaged_export_is_refused_and_the_one_before_stays(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(place)
    before = {path.name: path.read_bytes() for path in (place.folder / "models/merged").iterdir()}
    write = export_folder.write_merged

    def write_damaged(model: Any, adapter: Any, decision: Any, folder: Path) -> None:
        write(model, adapter, decision, folder)
        weights = load_file(folder / "model.safetensors")
        weights[f"{LAYER}.weight"] = -weights[f"{LAYER}.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_folder, "write_merged", write_damaged)
    message = refused(place, capfd)
    assert "does not answer as its adapter does; at least 99.5% have to be equal" in message
    assert "Nothing was exported" in message
    assert {path.name: path.read_bytes() for path in (place.folder / "models/merged").iterdir()} == before
    shutil.rmtree(place.folder / "models/merged")
    refused(place, capfd)
    assert not (place.folder / "models/merged").exists()


def test_rows_that_are_absent_or_of_other_prompts_are_refused(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = json.loads((place.folder / "models/adapter/prompt.json").read_text())
    place.write("models/adapter/prompt.json", json.dumps(prompt | {"template": "Film: {{ text }}"}))
    assert "its prompts are not made as those of models/adapter" in refused(place, capfd)
    assert "data/test.parquet: not found" in refused(place, capfd, "--rows", "data/test.parquet")


def test_help_and_mistakes_are_answered_before_torch_is_imported() -> None:
    code = "import serving.merge, serving.gguf, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_export_is_never_replaced(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    assert "holds something that is no merged model" in refused(place, capfd, "--output", "models/adapter")
    assert (place.folder / "models/adapter/adapter_model.safetensors").is_file()
    merged(place)
    assert "is a merged model, not an adapter" in refused(place, capfd, "--adapter", "models/merged")


def test_a_disk_without_room_is_noticed_before_the_work(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (place.folder / "models/.merged.killed").mkdir()
    capfd.readouterr()
    assert place.main(COMMAND) == 1
    message = capfd.readouterr().err
    assert "GB are free there" in message
    assert ".merged.killed is left of killed exports" in message


def test_a_link_to_where_there_is_room_stays_a_link(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "disk/merged").mkdir(parents=True)
    (place.folder / "models/merged").symlink_to(tmp_path / "disk/merged")
    merged(place)
    assert (place.folder / "models/merged").is_symlink()
    assert (tmp_path / "disk/merged/model.safetensors").is_file()


def test_a_folder_that_a_disk_is_mounted_at_is_refused(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a disk is mounted at /proc, which cannot be replaced" in refused(place, capfd, "--output", "/proc")
    folder = place.folder / "models/merged"
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == folder:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    # As of a bind mount of the same disk, which only renaming tells; none can be had without being root.
    folder.mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    assert f"a disk is mounted at {folder}, which" in refused(place, capfd)


def test_adapters_of_tied_embeddings_are_refused_before_anything_is_asked(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.merge.adapter_answers", lambda *arguments: pytest.fail("the adapter was asked"))
    config = json.loads((place.folder / "base/config.json").read_text())
    weights = load_file(place.folder / "base/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, place.folder / "base/model.safetensors", {"format": "pt"})
    place.write("base/config.json", json.dumps(config | {"tie_word_embeddings": True}))
    assert place.main("stages.base_model") == 0
    with place.entered():
        adapt(place, "lora", target_modules=["embed_tokens"])
    assert "in this base model they are one matrix" in refused(place, capfd)
    with place.entered():
        adapt(place, "prompt")
    assert "is a PROMPT_TUNING adapter, which changes prompts and not weights" in refused(place, capfd)


def adapt(place: Workplace, kind: str, **settings: Any) -> None:
    """Put an untrained adapter of another kind into models/adapter."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    folder = place.folder / "models/adapter"
    if kind == "lora":
        config: Any = LoraConfig(task_type="CAUSAL_LM", **settings)
    else:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_base(), config).save_pretrained(str(folder))
    shutil.copyfile(place.folder / "models/base.json", folder / "base.json")


def test_untied_embeddings_are_merged_too(place: Workplace) -> None:
    with place.entered():
        torch.manual_seed(0)
        adapt(place, "lora", target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    report = merged(place)
    assert min(report["equal"].values()) == 1
    found = load_file(place.folder / "models/merged/model.safetensors")["model.embed_tokens.weight"]
    base = load_file(place.folder / "base/model.safetensors")["model.embed_tokens.weight"]
    assert (found.float() - base).abs().max() > 0.01
