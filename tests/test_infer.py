"""The infer stage on split files and a tiny model; `test_label_scores` holds the scores themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from stages import infer
from stages.common.errors import UserError
from stages.common.labels import INVALID
from stages.common.params import Infer
from stages.common.scoring.generation import generate_answers, match_label
from stages.common.tables import open_table
from tests.tiny import make_tokenizer

LABELS = ["positive", "negative", "neutral"]
TERMINATOR = 2
SCORES = Infer(method="label_scores", max_new_tokens=None)
PARAMS = """
task: {kind: classification, labels: [positive, negative, neutral], label_descriptions: null, positive_label: null}
infer: {method: METHOD, max_new_tokens: LIMIT}
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def model(base_folder: Path) -> Any:
    torch.manual_seed(0)
    # Tied random embeddings repeat the last token for ever.
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder, tie_word_embeddings=False))
    with torch.no_grad():
        for weight in loaded.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # or every context gives nearly the same answer
    return loaded.eval()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path) -> Path:
    """A repository's root with split files of 5 and 0 rows and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path / "data/splits/validation.parquet", 5)
    write_split(tmp_path / "data/splits/test.parquet", 0)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tokenizer").symlink_to(base_folder)
    return tmp_path


def label_ids() -> dict[str, list[int]]:
    return {label: [*make_tokenizer().encode(f" {label}").ids, TERMINATOR] for label in LABELS}


def write_split(path: Path, count: int) -> None:
    schema = pa.schema(
        {"id": pa.string(), "text": pa.string(), "label": pa.string(), "prompt_ids": pa.list_(pa.int32())}
    )
    completions = {label: {"text": f" {label}", "ids": ids} for label, ids in label_ids().items()}
    with open_table(path, schema, {"prompt_format": {"labels": LABELS, "completions": completions}}) as table:
        for row in range(count):
            # The longest is neither first nor last, so that sorting by length shows.
            text = "what a nice day " * (1 + row * 3 % 5)
            ids = make_tokenizer().encode(f"Tweet: {text}{row}\nSentiment:").ids
            table.add({"id": f"row-{row}", "text": text, "label": LABELS[row % 3], "prompt_ids": ids})


def prompts_of(path: Path) -> list[list[int]]:
    return pq.read_table(path)["prompt_ids"].to_pylist()


def run_main(monkeypatch: pytest.MonkeyPatch, model: Any, arguments: list[str], method: str, limit: str) -> list[Any]:
    loaded: list[Any] = []

    def load_model(adapter: Path | None) -> Any:
        loaded.append(adapter)
        return model

    monkeypatch.setattr("stages.common.model.load_model", load_model)
    monkeypatch.setattr("sys.argv", ["infer", *arguments])
    Path("params.yaml").write_text(PARAMS.replace("METHOD", method).replace("LIMIT", limit))
    infer.main()
    return loaded


@pytest.mark.parametrize(("arguments", "name"), [([], "adapter"), (["base"], "base")])
def test_every_row_is_predicted_in_its_place(
    workspace: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
) -> None:
    loaded = run_main(monkeypatch, model, arguments, "label_scores", "null")
    assert loaded == [Path("models/adapter") if name == "adapter" else None]
    table = pq.read_table(workspace / f"data/predictions/{name}/validation.parquet").to_pydict()
    assert list(table) == ["id", "label", "prediction", *(f"probability.{label}" for label in LABELS)]
    assert table["id"] == [f"row-{row}" for row in range(5)]
    assert table["label"] == [LABELS[row % 3] for row in range(5)]
    # Each row alone, so that a row in another's place would show.
    for row, prompt in enumerate(prompts_of(workspace / "data/splits/validation.parquet")):
        answers, probabilities = infer.predict(model, [prompt], label_ids(), SCORES, lambda _: None)
        assert probabilities is not None
        found = [table[f"probability.{label}"][row] for label in LABELS]
        np.testing.assert_allclose(found, probabilities[0], rtol=0, atol=1e-5)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert table["prediction"][row] == answers[0] == LABELS[int(np.argmax(found))]
    assert pq.read_table(workspace / f"data/predictions/{name}/test.parquet").num_rows == 0
    assert f"infer: {name} predicted 5 rows of validation" in capsys.readouterr().out


def test_generated_answers_have_no_probabilities_and_keep_their_rows(
    workspace: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_main(monkeypatch, model, ["base"], "generate", "6")
    table = pq.read_table(workspace / "data/predictions/base/validation.parquet")
    assert table["id"].to_pylist() == [f"row-{row}" for row in range(5)]
    assert set(table["prediction"].to_pylist()) <= {*LABELS, INVALID}
    assert table["probability.positive"].null_count == 5


def test_probabilities_are_the_likelihoods_divided_by_their_sum() -> None:
    # Likelihoods 1 : 3 : 4, far below the smallest float64 (e^-745) unless scaled first.
    found = infer.posterior(np.log([[1.0, 3.0, 4.0]]) - 2000)
    np.testing.assert_allclose(found, [[0.125, 0.375, 0.5]], rtol=1e-9)
    assert infer.posterior(np.empty((0, 3))).shape == (0, 3)


def test_of_equally_likely_labels_the_first_of_the_task_is_predicted(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.common.scoring.label_scores.score_labels", lambda *_: np.array([[-3.0, -3.0, -4.0]]))
    assert infer.predict(model, [[5]], label_ids(), SCORES, lambda _: None)[0] == ["positive"]


def test_a_model_with_broken_weights_is_reported(workspace: Path, model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        infer.predict(model, [[5, 6]], label_ids(), SCORES, lambda _: None)
    assert not (workspace / "data/predictions").exists()


def test_slow_scoring_is_announced_with_its_reason(
    workspace: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model.config._attn_implementation = "flex_attention"
    split_path = workspace / "data/splits/test.parquet"
    infer.predict_part(model, split_path, label_ids(), SCORES, workspace / "out.parquet")
    assert "'flex_attention' takes no mask" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["bass"], ["base", "base"], ["adapter"], ["--help"]])
def test_other_arguments_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["infer", *arguments])
    with pytest.raises(UserError, match=r"Allowed: none.*`base`"):
        infer.main()


def test_split_files_for_other_labels_are_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match="made for the labels") as error:
        infer.read_label_ids(workspace / "data/splits/test.parquet", LABELS[::-1], SCORES)
    assert "data/splits/test.parquet" in str(error.value) and "format_prompts" in str(error.value)


def test_answers_shorter_than_a_label_are_refused(workspace: Path) -> None:
    longest = max(map(len, label_ids().values()))
    short = Infer(method="generate", max_new_tokens=longest - 1)
    with pytest.raises(UserError, match=rf"infer.max_new_tokens: {longest - 1} .* takes {longest} tokens"):
        infer.read_label_ids(workspace / "data/splits/test.parquet", LABELS, short)
    enough = Infer(method="generate", max_new_tokens=longest)
    assert infer.read_label_ids(workspace / "data/splits/test.parquet", LABELS, enough) == label_ids()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, one full forward pass for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generation_is_greedy_in_batches_of_any_size(workspace: Path, model: Any, tokenizer: Tokenizer) -> None:
    prompts = prompts_of(workspace / "data/splits/validation.parquet")
    expected = [tokenizer.decode(greedy(model, prompt, 6)) for prompt in prompts]
    assert len(set(expected)) > 1
    # What a hub model may bring along must not change a greedy answer.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    for tokens_per_batch in (1, 10_000):
        assert generate_answers(model, tokenizer, prompts, [TERMINATOR], 6, tokens_per_batch) == expected


def test_generation_stops_at_a_terminator(workspace: Path, model: Any, tokenizer: Tokenizer) -> None:
    prompts = prompts_of(workspace / "data/splits/validation.parquet")
    answers = [greedy(model, prompt, 6) for prompt in prompts]
    terminator = answers[2][3]
    expected = []
    for answer in answers:
        end = answer.index(terminator) if terminator in answer else 6
        expected.append(tokenizer.decode(answer[:end]))
    assert generate_answers(model, tokenizer, prompts, [terminator, TERMINATOR], 6, 10_000) == expected


def test_no_prompts_give_no_answers(model: Any, tokenizer: Tokenizer) -> None:
    assert generate_answers(model, tokenizer, [], [TERMINATOR], 6, 100) == []
    assert infer.predict(model, [], label_ids(), SCORES, lambda _: None)[0] == []


@pytest.mark.parametrize(
    ("answer", "prediction"),
    [
        ("cat", "cat"),
        (" cat\n", "cat"),
        ("catfish", "catfish"),
        ("", INVALID),
        ("   ", INVALID),
        ("ca", INVALID),
        ("Cat", INVALID),
        ("cat.", INVALID),
        ("cat catfish", INVALID),
        ("it is a cat", INVALID),
        (INVALID, INVALID),
    ],
)
def test_only_a_whole_label_counts_as_an_answer(answer: str, prediction: str) -> None:
    assert match_label(answer, ["cat", "catfish"]) == prediction
