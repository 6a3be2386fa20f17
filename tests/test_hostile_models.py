"""Models, adapters and checkpoints that ask for code to be run: refused, and nothing of theirs runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.common.base import file_sha256
from stages.common.errors import UserError
from stages.common.model import check_adapter
from tests.hub_server import COMMIT, endpoint_of, serve
from tests.workplace import Workplace, make_workplace


class Payload:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project whose data stages have run, to be copied."""
    place = make_workplace(tmp_path_factory.mktemp("models") / "project")
    for stage in ("base_model", "ingest", "format_prompts", "split"):
        assert place.main(f"stages.{stage}") == 0
    return place


@pytest.fixture
def place(made: Workplace, tmp_path: Path) -> Workplace:
    return Workplace(Path(shutil.copytree(made.folder, tmp_path / "project", symlinks=True)))


def refused(place: Workplace, capfd: pytest.CaptureFixture[str], *command: str, **environment: str) -> str:
    capfd.readouterr()
    assert place.main(*command, **environment) == 1
    message = capfd.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    return message


# --- the base model ---------------------------------------------------------------------------------------------------


def pickles_alone(base: Path, trace: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trace)))


def code_beside(base: Path, trace: Path) -> None:
    (base / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")


def of_config(**changes: Any) -> Callable[[Path, Path], None]:
    def change(base: Path, trace: Path) -> None:
        code_beside(base, trace)
        edit(base / "config.json", **changes)

    return change


def of_tokenizer(base: Path, trace: Path) -> None:
    code_beside(base, trace)
    edit(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="Tokenizer",
    )


KERNEL = "kernels-community/flash-attn2"
ASKING = {
    "pickles": (pickles_alone, "the source holds no safetensors file"),
    "a class": (of_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map in config.json"),
    "a class of a repository": (of_config(auto_map={"AutoConfig": "a/b--evil.C"}), "auto_map in config.json"),
    "a class further in": (of_config(text_config={"auto_map": {"AutoModel": "evil.M"}}), "auto_map in config.json"),
    "a tokenizer": (of_tokenizer, "auto_map in tokenizer_config.json"),
    "a kernel": (of_config(attn_implementation=KERNEL), "attn_implementation in config.json"),
    "a kernel as it is kept": (of_config(_attn_implementation=KERNEL), "_attn_implementation in config.json"),
    "a kernel for a part": (of_config(attn_implementation={"": KERNEL}), "attn_implementation in config.json"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "name"),
    [*(("folder", name) for name in ASKING), *(("hub", name) for name in ("pickles", "a class", "a kernel"))],
)
def test_a_base_model_that_asks_for_code_is_refused(
    name: str, source: str, place: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, expected = ASKING[name]
    trace = tmp_path / "trace"
    change(place.folder / "base", trace)
    environment = {}
    if source == "folder":
        message = refused(place, capfd, "stages.base_model")
    else:
        with serve({path.name: path.read_bytes() for path in (place.folder / "base").iterdir()}) as hub:
            place.set("base_model", {"source": "hub", "repo_id": "some/base", "revision": COMMIT})
            environment = {"HF_ENDPOINT": endpoint_of(hub), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
            result = place.run("stages.base_model", **environment)
            message = result.stderr
            assert result.returncode == 1 and "Traceback" not in message
    assert expected in message
    assert not trace.exists() and not list((place.folder / "models/base").glob("evil.py"))


def test_an_architecture_that_lacks_a_package_is_refused(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    edit(place.folder / "base/config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert place.main("stages.base_model") == 0
    assert "transformers cannot load this base model" in refused(place, capfd, "stages.infer", "base")


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_of_pickles(folder: Path, base: Path, trace: Path, name: str) -> None:
    """As PEFT saves it without safetensors, but that its weights are a call."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weights": Payload(trace)}, folder / name)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_an_adapter_of_pickles_is_refused(
    name: str, place: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace, adapter = tmp_path / "trace", place.folder / "models/adapter"
    adapter_of_pickles(adapter, place.folder / "base", trace, name)
    (adapter / "prompt.json").write_text("{}")
    shutil.copy(place.folder / "models/base.json", adapter / "base.json")
    for file in (place.folder / "models/tokenizer").iterdir():
        shutil.copy(file, adapter)
    assert "lacks adapter_model.safetensors" in refused(place, capfd, "stages.infer")
    assert "lacks adapter_model.safetensors" in refused(place, capfd, "serving.predict", "--text", "x")
    with pytest.raises(UserError, match="pickled ones"):
        check_adapter(adapter)
    assert not trace.exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------

INTERRUPT = """
import runpy, sys
from stages.common.training import trainer
made = trainer.make_trainer
def stopping(*arguments):
    found = made(*arguments)
    save = found._save_checkpoint
    def saved(*arguments, **options):
        save(*arguments, **options)
        if found.state.global_step >= 4:
            found.callback_handler.on_save(found.args, found.state, found.control)
            raise KeyboardInterrupt
    found._save_checkpoint = saved
    return found
trainer.make_trainer = stopping
runpy.run_module("stages.finetune", run_name="__main__")
"""


@pytest.fixture(scope="module")
def interrupted(made: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A training that was interrupted behind its second checkpoint or later; to be copied."""
    folder = tmp_path_factory.mktemp("interrupted") / "project"
    place = Workplace(Path(shutil.copytree(made.folder, folder, symlinks=True)))
    place.write("interrupt.py", INTERRUPT)
    result = place.run("interrupt", CHECKPOINT_EVERY_MINUTES="0")
    assert result.returncode == 130, result.stderr
    return place


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.mark.parametrize("names", [FILES, *(pytest.param([name], marks=pytest.mark.slow) for name in FILES)])
def test_a_checkpoint_with_code_in_it_runs_none(names: list[str], interrupted: Workplace, tmp_path: Path) -> None:
    place = Workplace(Path(shutil.copytree(interrupted.folder, tmp_path / "project", symlinks=True)))
    trace, payload = tmp_path / "trace", tmp_path / "payload"
    torch.save({"state": Payload(trace)}, payload)
    checkpoints = list((place.folder / "checkpoints").glob("*/checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        for name in names:
            shutil.copy(payload, checkpoint / name)
            # Whoever can write there can write its hashes too.
            if (hashes := checkpoint / "sha256.json").is_file():
                edit(hashes, **{name: file_sha256(payload)})
    result = place.run("stages.finetune")
    assert not trace.exists()
    assert "from checkpoint-" in result.stdout
    if names == ["training_args.bin"]:
        assert result.returncode == 0, result.stderr  # nothing reads it
    else:
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
        assert "a checkpoint holds something else than tensors and plain values" in result.stderr
    # The payload does run where a program lets it.
    torch.load(payload, weights_only=False)
    assert trace.exists()
