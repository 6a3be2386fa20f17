"""Folders of any size: cut into parts, answered by one process or several, killed, resumed; no row lost or twice."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.batch import parts
from serving.batch.folder import InputFile, find_files
from serving.batch.options import arguments, check_arguments, folder_encoding
from serving.batch.piece import DamagedFileError
from serving.batch.pieces import Reader, cut, survey
from serving.batch.processes import Claims, Process, take_gpu
from serving.common.adapter import answers_sha256, read_adapter
from stages.common.errors import UserError
from tests.sharp import sharp_model
from tests.test_predict import of_kind
from tests.workplace import WORDS, Workplace, make_workplace

COMMAND = "serving.predict"
LABELS = list(WORDS)
VOCABULARY = [*itertools.chain(*WORDS.values()), "the", "film", "of", "day", "was", "a", "b"]
# Of the tests' own folder: enough parts for processes to be killed among them.
ROWS, ROWS_PER_PART = 420, 60
SEED, KILLS = 0, int(os.environ.get("FOLDER_KILLS", "6"))
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", COMMAND]


# --- a project, a folder, runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project through `finetune`, with a folder `in` of three tables."""
    place = make_workplace(tmp_path_factory.mktemp("folder") / "project")
    sharp_model(place.folder / "base").save_pretrained(place.folder / "base")
    place.set("finetune.learning_rate", 0.02)
    for stage in ("base_model", "ingest", "format_prompts", "split", "finetune"):
        assert place.main(f"stages.{stage}") == 0
    place.write("in/a.parquet", b"")
    pq.write_table(pa.table({"text": texts("a"), "n": range(ROWS)}), place.folder / "in/a.parquet", row_group_size=100)
    place.write("in/b.jsonl", json_lines(texts("b")))
    place.write("in/sub/c.jsonl.gz", gzip.compress(json_lines(texts("c"))))
    return place


@pytest.fixture
def place(trained: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it."""
    return Workplace(Path(shutil.copytree(trained.folder, tmp_path / "project")))


def texts(seed: str, rows: int = ROWS) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(VOCABULARY, k=generator.randint(3, 12))) for _ in range(rows)]


def json_lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()


class Answered(NamedTuple):
    code: int
    messages: str


Ask = Callable[..., Answered]


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Ask:
    """Run the command in this process, with `in` and `out` as folders unless others are given."""

    def ask(place: Workplace, *arguments: str, **environment: str) -> Answered:
        capfd.readouterr()
        given = () if "--folder" in arguments else ("--folder", "in", "--output-folder", "out")
        code = place.main(COMMAND, *given, "--rows-per-part", str(ROWS_PER_PART), *arguments, **environment)
        captured = capfd.readouterr()
        assert captured.out == ""
        return Answered(code, captured.err)

    return ask


def lines_of(place: Workplace, folder: str = "out") -> list[dict[str, Any]]:
    """What all JSON Lines parts say, in the order of their names."""
    return [json.loads(line) for path in parts_in(place, folder) for line in path.read_bytes().splitlines()]


def parts_in(place: Workplace, folder: str = "out") -> list[Path]:
    return sorted((place.folder / folder).glob("part-*"))


def contents(place: Workplace, folder: str = "out") -> dict[str, bytes]:
    """All that lies in the output folder but the lock."""
    return {path.name: path.read_bytes() for path in (place.folder / folder).iterdir() if path.name != ".lock"}


@contextmanager
def held(place: Workplace, take: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock on `out`."""
    (place.folder / "out").mkdir(exist_ok=True)
    code = (
        "import time; from pathlib import Path; from serving.batch.processes import Claims\n"
        f"claims = Claims(Path('out')); assert claims.{take}; print('held', flush=True); time.sleep(120)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=place.folder, env=place.environment(), stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_parts_in_the_order_of_their_names_are_the_answers_of_the_single_files(
    place: Workplace, ask: Ask, capfd: pytest.CaptureFixture[str]
) -> None:
    place.write("in/_SUCCESS", "")
    place.write("in/.b.jsonl.crc", "x")
    place.write("in/README.md", "about")
    found = ask(place)
    assert found.code == 0, found.messages
    assert "1 files of in are no tables and are not read: README.md" in found.messages
    assert f"{3 * ROWS:,} rows, 0 shortened, 0 without an answer, in 21 parts in out" in found.messages
    lines = lines_of(place)
    expected = []
    for name in ("a.parquet", "b.jsonl", "sub/c.jsonl.gz"):
        assert place.main(COMMAND, "--file", f"in/{name}") == 0
        printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        expected += [line | {"id": f"{name}:{number}"} for number, line in enumerate(printed, start=1)]
    assert [line["id"] for line in lines] == [line["id"] for line in expected]
    assert [line["label"] for line in lines] == [line["label"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-6)
    assert len({round(line["probabilities"]["bad"], 4) for line in lines}) > 100, "rows differ, so order is tested"
    assert [len(path.read_bytes().splitlines()) for path in parts_in(place)] == [ROWS_PER_PART] * 21
    summary = {"rows": 3 * ROWS, "shortened": 0, "without_answer": 0, "parts": 21}
    assert json.loads((place.folder / "out/summary.json").read_text()) == summary


def test_parquet_parts_have_the_columns_of_the_pipelines_predictions(place: Workplace, ask: Ask) -> None:
    shutil.rmtree(place.folder / "in/sub")
    (place.folder / "in/b.jsonl").unlink()
    table = pq.read_table(place.folder / "in/a.parquet").slice(0, 70)
    values = table.to_pydict()
    values["text"][3], values["text"][66] = " ", "the fine film " * 200
    pq.write_table(pa.table(values), place.folder / "in/a.parquet")
    assert ask(place, "--output-format", "jsonl", "--folder", "in", "--output-folder", "lines").code == 1
    found = ask(place, "--id-column", "{n}/")
    assert found.code == 1
    assert "1 of 70 rows could not be answered" in found.messages and "\n  3/: the text is empty\n" in found.messages
    assert "70 rows, 1 shortened, 1 without an answer" in found.messages
    rows = pa.concat_tables([pq.read_table(path) for path in parts_in(place)]).to_pylist()
    names = ["id", "label", *(f"probability.{label}" for label in LABELS), "shortened", "error"]
    assert all(list(row) == names for row in rows)
    lines = lines_of(place, "lines")
    assert [row["id"] for row in rows] == [f"{number}/" for number in range(70)]
    assert [row["label"] for row in rows] == [line.get("label") for line in lines]
    assert [row["probability.good"] for row in rows] == [line.get("probabilities", {}).get("good") for line in lines]
    assert rows[3] == dict.fromkeys(names) | {"id": "3/", "error": "the text is empty", "shortened": False}
    assert [number for number, row in enumerate(rows) if row["shortened"]] == [66]
    again = ask(place, "--id-column", "{n}/")
    assert (again.code, again.messages.splitlines()[-4:]) == (1, found.messages.splitlines()[-4:]), "told from the disk"


@pytest.mark.parametrize(("kind", "column"), [("multi_label", "labels"), ("question_answering", "answer")])
def test_other_tasks_have_their_own_columns(place: Workplace, ask: Ask, kind: str, column: str) -> None:
    of_kind(place, kind)
    shutil.rmtree(place.folder / "in/sub")
    pq.write_table(pa.table({"text": texts("a", 5)}), place.folder / "in/a.parquet")
    place.write("in/b.jsonl", json_lines(texts("b", 5)))
    assert ask(place, "--output-format", "parquet").code == 0
    assert ask(place, "--folder", "in", "--output-folder", "lines").code == 0
    rows = pa.concat_tables([pq.read_table(path) for path in parts_in(place)]).to_pylist()
    assert [row[column] for row in rows] == [line[column] for line in lines_of(place, "lines")]
    assert (f"probability.{LABELS[0]}" in rows[0]) == (kind == "multi_label")


def test_a_row_without_an_answer_keeps_its_place_and_its_reason(place: Workplace, ask: Ask) -> None:
    content = b'{"text": "nice"}\n\n{"text": "bad"\n[1]\r\n{"text": "b\xff"}\n{"text": 5}\n{"t": "error"}'
    shutil.rmtree(place.folder / "in")
    place.write("in/r.jsonl", content)
    found = ask(place, "--rows-per-part", "2")
    assert found.code == 1
    assert [(line["id"], line.get("error", "")[:12]) for line in lines_of(place)] == [
        ("r.jsonl:1", ""), ("r.jsonl:3", "is no JSON ("), ("r.jsonl:4", "is a JSON li"), ("r.jsonl:5", "is not utf-8"),
        ("r.jsonl:6", ""), ("r.jsonl:7", "the text is "),
    ]  # fmt: skip
    assert "4 of 6 rows could not be answered" in found.messages


# --- killed, and gone on with -----------------------------------------------------------------------------------------

# Starts the command again and again without importing torch again: real processes, which can be killed.
STARTER = """
import json, os, sys
import torch, serving.predictor, stages.common.scoring.loading, stages.common.scoring.label_predictions
from serving import predict
from stages.common.errors import run_stage
for line in sys.stdin:
    if not (pid := os.fork()):
        sys.argv = ["predict", *json.loads(line)]
        try:
            run_stage(predict.main)
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def starter(place: Workplace) -> Iterator[Callable[..., tuple[int, Callable[[], int]]]]:
    """What starts the command in a process of its own, and gives its id and what waits for its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=place.folder, env=place.environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def start(*arguments: str) -> tuple[int, Callable[[], int]]:
            print(json.dumps(arguments), file=requests, flush=True)
            return int(answers.readline()), lambda: int(answers.readline())

        yield start
        requests.close()


def test_killed_at_any_moment_it_ends_in_the_same_bytes(place: Workplace) -> None:
    arguments = ["--folder", "in", "--rows-per-part", "15", "--output-folder"]
    generator = random.Random(SEED)
    killed_at = []
    with starter(place) as start:
        _, code = start(*arguments, "whole")
        began = time.monotonic()
        assert code() == 0
        seconds, total = time.monotonic() - began, len(parts_in(place, "whole"))
        for kill in range(KILLS):
            process, code = start(*arguments, "out")
            # Before its end is near: it must not get there by itself.
            wanted = generator.randint(kill * total // (KILLS + 2), (kill + 1) * total // (KILLS + 2) - 1)
            # The first one may come before there is anything.
            while kill and len(parts_in(place)) < wanted and psutil.pid_exists(process):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, seconds / (total if kill else 4)))
            os.kill(process, signal.SIGKILL)
            assert code() == -signal.SIGKILL, "it was at work"
            killed_at.append(len(parts_in(place)))
        before = {path: path.stat().st_mtime_ns for path in parts_in(place)}
        _, code = start(*arguments, "out")
        assert code() == 0
    assert 0 < killed_at[-1] < total
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items()), "nothing is done twice"
    assert contents(place) == contents(place, "whole"), "and nothing is left over"
    assert [line["id"] for line in lines_of(place)] == [
        f"{name}:{number}" for name in ("a.parquet", "b.jsonl", "sub/c.jsonl.gz") for number in range(1, ROWS + 1)
    ]


def test_two_processes_of_accelerate_share_the_parts_and_one_that_dies_fails_the_run(
    place: Workplace, ask: Ask
) -> None:
    arguments = ["--folder", "in", "--rows-per-part", "15", "--output-folder"]
    assert ask(place, *arguments, "whole", OMP_NUM_THREADS="1").code == 0
    command = [sys.executable, "-m", *LAUNCH, *arguments, "out"]
    environment = place.environment()
    with subprocess.Popen(
        command, cwd=place.folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as launcher:
        second = None
        while second is None or not parts_in(place):
            assert launcher.poll() is None
            time.sleep(0.02)
            found = psutil.Process(launcher.pid).children(recursive=True)
            second = next((child for child in found if rank_of(child) == "1"), None)
        second.kill()
        _, messages = launcher.communicate()
    assert launcher.returncode != 0, messages
    done = parts_in(place)
    assert 0 < len(done) < len(parts_in(place, "whole"))
    assert not (place.folder / "out/summary.json").exists()
    result = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert contents(place) == contents(place, "whole")
    assert result.stderr.count("predict: 1,260 rows, 0 shortened, 0 without an answer, in 84 parts in out") == 1


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def test_what_another_process_leaves_behind_is_answered_last(place: Workplace, ask: Ask) -> None:
    assert ask(place, "--folder", "in", "--output-folder", "whole").code == 0
    seen: list[str] = []

    def wait_and_kill(holder: subprocess.Popen[str]) -> None:
        while len(parts_in(place)) < 20:
            time.sleep(0.01)
        time.sleep(0.5)
        seen.extend(path.name for path in parts_in(place))
        holder.kill()

    with held(place, "take(1_000_003)") as holder:
        watcher = threading.Thread(target=wait_and_kill, args=(holder,))
        watcher.start()
        assert ask(place).code == 0
        watcher.join()
    assert len(seen) == 20 and "part-000001-000003.jsonl" not in seen, "waited for as long as the other lived"
    assert contents(place) == contents(place, "whole")


def test_a_process_that_does_not_lead_leaves_when_all_is_done_or_claimed(place: Workplace, ask: Ask) -> None:
    assert ask(place).code == 0
    (place.folder / "out/summary.json").unlink()
    expected = contents(place)
    for path in parts_in(place)[2:6]:
        path.unlink()
    with held(place, "take(3)"):
        found = ask(place, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
        assert found.code == 0
        assert "predict:" not in found.messages
    missing = expected.keys() - contents(place).keys()
    assert missing == {"part-000000-000003.jsonl"}
    assert all(content == expected[name] for name, content in contents(place).items())


def test_a_second_run_on_the_same_output_is_refused(place: Workplace, ask: Ask) -> None:
    with held(place, "take_run()"):
        found = ask(place)
    assert found.code == 1
    assert "error: out: another run is at work on it. Wait for it, or end it" in found.messages
    assert contents(place) == {}
    assert ask(place).code == 0, "the lock went with its process"


# --- other inputs, other adapters -------------------------------------------------------------------------------------


def change_adapter(place: Workplace) -> list[str]:
    path = place.folder / "models/adapter/prompt.json"
    path.write_text(path.read_text().replace("Opinion", "Verdict"))
    return []


def change_rule(place: Workplace) -> list[str]:
    place.write("models/decision.json", json.dumps({"adapter": {"rule": "argmax"}}))
    return []


def add_file(place: Workplace) -> list[str]:
    place.write("in/d.jsonl", json_lines(["new"]))
    (place.folder / "in/b.jsonl").unlink()
    return ["--replace-changed"]


def change_file(place: Workplace) -> list[str]:
    path = place.folder / "in/b.jsonl"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"fine", b"FINE", 1))
    assert path.stat().st_size == status.st_size
    return []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_adapter, "out: was begun otherwise, and answers of two kinds must not mix:\n  adapter: "),
        (change_rule, '\n  decision: null then, {"rule": "argmax"} now\n'),
        (lambda place: ["--id-column", "n"], '\n  id_column: null then, "n" now\nGive the same again, or'),
        (lambda place: ["--rows-per-part", "61"], "\n  rows_per_part: 60 then, 61 now\n"),
        (add_file, "out: was begun with other files: d.jsonl came and b.jsonl went since. Parts are numbered"),
        (change_file, "out: was begun when b.jsonl held something else. Restore the input; or give --replace-changed"),
    ],
)
def test_answers_of_two_kinds_do_not_mix(
    place: Workplace, ask: Ask, change: Callable[[Workplace], list[str]], expected: str
) -> None:
    assert ask(place).code == 0
    before = contents(place)
    more = change(place)
    found = ask(place, *more)
    assert found.code == 1
    assert expected in found.messages and found.messages.count("error: ") == 1
    assert contents(place) == before


def test_only_the_parts_of_changed_files_are_made_again(place: Workplace, ask: Ask) -> None:
    assert ask(place).code == 0
    before = {path: path.stat().st_mtime_ns for path in parts_in(place)}
    # Fewer rows, so fewer parts; and a file that was only copied.
    place.write("in/b.jsonl", json_lines(texts("other", 100)))
    place.write("out/.part-000001-000005.jsonl.tmp", "left by a killed process")
    os.utime(place.folder / "in/a.parquet")
    found = ask(place, "--replace-changed")
    assert found.code == 0
    assert "made again since they have changed: the parts of b.jsonl" in found.messages
    after = {path: path.stat().st_mtime_ns for path in parts_in(place)}
    assert {path for path in after if after[path] != before.get(path)} == {
        path for path in after if path.name.startswith("part-000001")
    }
    assert ask(place, "--folder", "in", "--output-folder", "fresh").code == 0
    assert contents(place) == contents(place, "fresh")


def test_files_do_not_change_under_a_process_that_is_still_at_work(place: Workplace, ask: Ask) -> None:
    assert ask(place).code == 0
    before = contents(place)
    change_file(place)
    with held(place, "take(0)"):
        found = ask(place, "--replace-changed")
    assert found.code == 1
    assert "error: out: processes of an earlier run are still at work on it." in found.messages
    assert contents(place) == before


def test_a_process_whose_manifest_was_written_again_ends(place: Workplace, ask: Ask) -> None:
    assert ask(place).code == 0
    parts_in(place)[0].unlink()
    manifest = place.folder / "out/manifest.json"

    def written_again(*arguments: Any) -> bool:
        manifest.write_bytes(manifest.read_bytes())
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "take", written_again)
        found = ask(place)
    assert found.code == 1
    assert "error: out: was begun anew, or taken away, while this process was at work." in found.messages
    assert len(parts_in(place)) == 20


def test_a_file_that_is_written_to_meanwhile_fails_the_run(
    place: Workplace, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(path: Path, adapter: Any) -> Any:
        if path.name == "part-000002-000006.jsonl":
            place.write("in/b.jsonl", json_lines([*texts("b"), "late"]))
        return open_part(path, adapter)

    open_part = parts.open_part
    with monkeypatch.context() as patch:
        patch.setattr("serving.batch.folder_run.open_part", grow)
        found = ask(place)
    assert found.code == 1
    assert "error: --folder: b.jsonl was written to while the folder was answered" in found.messages
    assert not (place.folder / "out/summary.json").exists()
    assert ask(place).code == 1
    assert ask(place, "--replace-changed").code == 0
    assert lines_of(place)[2 * ROWS]["id"] == f"b.jsonl:{ROWS + 1}"


def test_an_adapter_that_changes_while_it_is_loaded_answers_nothing(
    place: Workplace, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving import predictor

    load = predictor.load

    def load_changed(*arguments: Any) -> Any:
        change_adapter(place)
        return load(*arguments)

    monkeypatch.setattr(predictor, "load", load_changed)
    found = ask(place)
    assert found.code == 1
    assert "error: models/adapter: was written to since this run began" in found.messages
    assert not parts_in(place)


def test_an_adapter_is_another_one_where_it_answers_otherwise(place: Workplace) -> None:
    folder = place.folder / "models/adapter"
    adapter = read_adapter(folder)
    first = answers_sha256(adapter)
    for name in ("README.md", "provenance.json", "parity.json", "training_log/log.json", ".cache/hub/tokenizer.json"):
        place.write(f"models/adapter/{name}", "{}")
    base = json.loads((folder / "base.json").read_text())
    place.write("models/adapter/base.json", json.dumps(base | {"source": "elsewhere"}))
    ruled = adapter._replace(rule={"rule": "argmax"})
    assert first == answers_sha256(adapter) == answers_sha256(ruled)
    assert answers_sha256(adapter, with_rule=True) != answers_sha256(ruled, with_rule=True)
    place.write("models/adapter/base.json", json.dumps(base | {"files": {"a": "b"}}))
    assert answers_sha256(adapter) != first
    place.write("models/adapter/base.json", json.dumps(base))
    change_adapter(place)
    assert answers_sha256(adapter) != first


# --- files that cannot be read ----------------------------------------------------------------------------------------


def test_a_damaged_page_stops_its_part_alone_and_a_whole_file_mends_it(place: Workplace, ask: Ask) -> None:
    path = place.folder / "in/a.parquet"
    whole = path.read_bytes()
    assert ask(place, "--folder", "in", "--output-folder", "fresh").code == 0
    start = pq.read_metadata(path).row_group(2).column(0).dictionary_page_offset
    path.write_bytes(whole[: start + 20] + bytes(200) + whole[start + 220 :])
    found = ask(place)
    assert found.code == 1
    assert (
        "2 of 21 parts could not be made; all others are in out:\n  a.parquet: is damaged or incomplete after row 2"
        in (found.messages)
    )
    assert "run again with --replace-changed" in found.messages and "Traceback" not in found.messages
    assert len(parts_in(place)) == 19 and not (place.folder / "out/summary.json").exists()
    path.write_bytes(whole)
    assert ask(place, "--replace-changed").code == 0
    assert contents(place).keys() == contents(place, "fresh").keys()
    assert lines_of(place) == lines_of(place, "fresh")


def test_a_long_text_that_all_rows_share_is_in_memory_once_and_a_bomb_of_it_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "bomb.parquet", "x" * 2**20
    indices = pa.array([0] * 1_000, pa.int32())
    pq.write_table(pa.table({"text": pa.DictionaryArray.from_arrays(indices, [text])}), path)
    file = InputFile("bomb.parquet", path, "parquet")
    assert path.stat().st_size < 2**18
    [piece] = cut(survey(file, 1_000, ["text"], "utf-8"), 1_000)
    with pytest.raises(DamagedFileError, match=r"bomb\.parquet: holds more than [\d,]+ bytes once it is decompressed"):
        list(Reader(["text"], "utf-8").rows(file, piece))
    few = piece._replace(rows=200)
    tracemalloc.start()
    assert [row[0] == text for _, row in Reader(["text"], "utf-8").rows(file, few)] == [True] * 200
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 * len(text), "rows are made one by one, not two hundred at once"


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("in/d.csv", b"text\na\n", [], "error: --folder: in holds d.csv. A folder's tables are Parquet or JSON Lines"),
        ("in/d.json", b'\n[{"text": "a"}]', [], "error: d.json: is one JSON list, which can be entered at its beginn"),
        ("in/d.parquet", b"PAR1", [], "error: d.parquet: is damaged or incomplete after its beginning ("),
        ("in/d.jsonl.gz", gzip.compress(json_lines(["a"] * 900))[:-9], [], "error: d.jsonl.gz: is damaged or inco"),
        ("in/d.jsonl", b'{"texte": "a"}\n', [], "error: d.jsonl: has no column 'text'. It has 'texte'. Did you mean"),
        ("in/d.jsonl", b'{"text": "a"}\n', ["--column", "{t!r}"], "error: --column: '{t!r}' has something else than"),
        ("out/mine.txt", b"", [], "error: --output-folder: out holds mine.txt, but no manifest.json"),
        ("out/manifest.json", b"{}", [], "error: out/manifest.json: is no manifest of this command"),
        ("out", b"", [], "error: out: a file lies where a folder has to be: move it away"),
        ("x", b"", ["--folder", "no", "--output-folder", "o"], "error: --folder: no is no folder. Correct the path;"),
        ("x", b"", ["--folder", "in"], "error: --folder: its answers need a folder of their own. Name one with --outp"),
        ("x", b"", ["--folder", "in", "--output-folder", "in/o"], "error: --output-folder: in/o lies in in, where it"),
        ("x", b"", ["--folder", "data/code", "--output-folder", "o"], "data/code has no Parquet or JSON Lines file"),
        ("x", b"", ["--output", "o"], "error: --output: of a folder the answers go into --output-folder. Leave it"),
        ("x", b"", ["--format", "csv"], "error: --format: csv: a folder's tables are jsonl or parquet."),
        ("x", b"", ["--rows-per-part", "-1"], "error: --rows-per-part: -1 is none. Give 1 to 1,000,000."),
        ("x", b"", ["--encoding", "utf-16"], "error: --encoding: in utf-16 lines cannot be found by their bytes"),
        ("x", b"", ["--adapter", "no/a"], "error: no/a: there is no adapter."),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_one_message_before_anything_is_answered(
    place: Workplace, ask: Ask, name: str, content: bytes, options: list[str], expected: str
) -> None:
    place.write(name, content)
    found = ask(place, *options)
    assert found.code == 1
    assert expected in found.messages
    assert found.messages.count("error: ") == 1 and "Traceback" not in found.messages
    assert not parts_in(place) if (place.folder / "out").is_dir() else True


@pytest.mark.parametrize(
    "option", ["--output-folder o", "--output-format jsonl", "--rows-per-part 5", "--replace-changed"]
)
def test_options_about_folders_are_refused_beside_texts(
    place: Workplace, capfd: pytest.CaptureFixture[str], option: str
) -> None:
    assert place.main(COMMAND, "--text", "a", *option.split()) == 1
    assert f"error: {option.split()[0]}: is about --folder, which is not given." in capfd.readouterr().err


def test_a_folder_without_any_row_is_refused_and_a_file_without_any_is_not(place: Workplace, ask: Ask) -> None:
    shutil.rmtree(place.folder / "in")
    place.write("in/a.jsonl", "")
    found = ask(place)
    assert found.code == 1
    assert "error: --folder: its files hold no rows" in found.messages
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), place.folder / "in/b.parquet")
    place.write("in/c.jsonl", json_lines(["nice"]))
    assert ask(place).code == 0
    assert [line["id"] for line in lines_of(place)] == ["c.jsonl:1"]


def test_a_disk_without_room_ends_in_one_message_and_leaves_no_half_of_a_part(
    place: Workplace, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the device that is always full can be had without being root: lines are written to it in the file's place.
    def write_to_full(file: Any, lines: Any) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write", write_to_full)
        found = ask(place)
    assert found.code == 1
    assert "the disk is full: free some space, then run the same command again" in found.messages
    assert contents(place).keys() == {"manifest.json"}
    assert ask(place).code == 0


# --- pieces -----------------------------------------------------------------------------------------------------------

LINES = ['{"text": "é 1"}', "", '{"text": "2"}\r', "  ", *(f'{{"text": "{number}"}}' for number in range(5, 24))]
NUMBERED = [(1, ["é 1"]), (3, ["2"]), *((number, [str(number)]) for number in range(5, 24))]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("rows_per_piece", [1, 5, 23, 100])
def test_json_lines_are_cut_anywhere_and_no_row_is_lost_or_doubled(
    tmp_path: Path, pack: Callable[[bytes], bytes], end: str, rows_per_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batch.json_rows.BLOCK", 7)
    path = tmp_path / "r.jsonl"
    path.write_bytes(pack(("\ufeff" + "\n".join(LINES) + end).encode()))
    check_pieces(InputFile("r.jsonl", path, "jsonl"), rows_per_piece, 23, NUMBERED)


@pytest.mark.parametrize("group", [1, 4, 7, 100])
@pytest.mark.parametrize("rows_per_piece", [1, 5, 20, 100])
def test_parquet_is_cut_anywhere_and_no_row_is_lost_or_doubled(
    tmp_path: Path, group: int, rows_per_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batch.parquet_rows.ROWS_PER_BATCH", 3)
    path = tmp_path / "r.parquet"
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": [str(number) for number in range(1, 21)]}), row_group_size=group)
        writer.write_table(pa.table({"text": pa.array([], pa.string())}))
    rows = [(number, [str(number)]) for number in range(1, 21)]
    check_pieces(InputFile("r.parquet", path, "parquet"), rows_per_piece, 20, rows)


def check_pieces(file: InputFile, rows_per_piece: int, rows: int, expected: list[Any]) -> None:
    """Read in order, backwards, and every second one, the pieces hold all rows once."""
    found = survey(file, rows_per_piece, ["text"], "utf-8")
    pieces = cut(found, rows_per_piece)
    assert found.rows == rows == sum(piece.rows for piece in pieces)
    assert [piece.rows for piece in pieces[:-1]] == [rows_per_piece] * (len(pieces) - 1)
    for order in (pieces, pieces[::-1], pieces[1::2] + pieces[::2]):
        reader = Reader(["text"], "utf-8")
        read = {piece: list(reader.rows(file, piece)) for piece in order}
        assert list(itertools.chain(*(read[piece] for piece in pieces))) == expected


def test_a_line_without_an_end_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batch.json_rows.MOST_LINE_BYTES", 20)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 100)
    with pytest.raises(UserError, match=r"r\.jsonl: line 2 has 20 bytes or more, so it is no row"):
        survey(InputFile("r.jsonl", path, "jsonl"), 10, ["text"], "utf-8")


def test_files_come_in_the_order_of_their_paths_and_format_names_those_without_an_ending(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "b.ndjson", "a/y.PARQUET", "b/_logs/z.jsonl", ".hidden.jsonl", "part-0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files, passed = find_files(tmp_path, None)
    assert [(file.name, file.form) for file in files] == [
        ("a/y.PARQUET", "parquet"), ("b.ndjson", "jsonl"), ("b/x.jsonl", "jsonl")
    ]  # fmt: skip
    assert passed == ["part-0"]
    files, passed = find_files(tmp_path, "jsonl")
    assert [file.name for file in files] == ["a/y.PARQUET", "b.ndjson", "b/x.jsonl", "part-0"]
    assert {file.form for file in files} == {"jsonl"} and not passed


def test_what_could_hold_rows_and_is_not_looked_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder / "a.jsonl", folder / "sub/b.jsonl", elsewhere / "c.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (folder / "c.jsonl").symlink_to(elsewhere / "c.jsonl")
    (folder / "_old").symlink_to(elsewhere)
    (folder / ".gone.jsonl").symlink_to("gone")
    names = ["a.jsonl", "c.jsonl", "sub/b.jsonl"]
    assert [file.name for file in find_files(folder, None)[0]] == names
    with monkeypatch.context() as patch:
        # Root, as which tests may run, can read everything.
        scandir = os.scandir

        def refuse(path: Any) -> Any:
            if Path(path) == folder / "sub":
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        patch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match="in/sub"):
            find_files(folder, None)
    (folder / "gone.jsonl").symlink_to("gone")
    (folder / "sub/link").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"in holds gone\.jsonl, sub/link: links to folders, or names that lead to no"):
        find_files(folder, None)


def test_a_cell_that_python_has_no_value_for_is_the_problem_of_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    text = pa.array([b"a", b"b\xff", b"c", b"d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text, "n": pa.array([1, 2, 2**62, 4], pa.timestamp("us"))}), path)
    file = InputFile("r.parquet", path, "parquet")
    [piece] = cut(survey(file, 10, ["text", "n"], "utf-8"), 10)
    rows = list(Reader(["text", "n"], "utf-8").rows(file, piece))
    unusable = "holds a value that cannot be used"
    assert [(number, values if isinstance(values, str) else values[0]) for number, values in rows] == [
        (1, "a"),
        (2, f"{unusable} ('utf-8' codec can't decode byte 0xff in position 1: invalid start byte)"),
        (3, f"{unusable} (date value out of range)"),
        (4, "d"),
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_lines_that_have_gone_since_a_file_was_looked_through_are_missed(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "r.jsonl"
    file = InputFile("r.jsonl", path, "jsonl")
    path.write_bytes(pack(json_lines(texts("a", 20))))
    pieces = cut(survey(file, 5, ["text"], "utf-8"), 5)
    path.write_bytes(pack(json_lines(texts("a", 8))))
    reader = Reader(["text"], "utf-8")
    assert len(list(reader.rows(file, pieces[0]))) == 5
    for piece in pieces[1:]:
        with pytest.raises(DamagedFileError, match=r"r\.jsonl: .*it has fewer lines than when it was looked through"):
            list(reader.rows(file, piece))


def test_a_file_that_is_damaged_when_it_is_opened_again_can_be_left_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    file = InputFile("r.parquet", path, "parquet")
    pq.write_table(pa.table({"text": ["a"]}), path)
    [piece] = cut(survey(file, 5, ["text"], "utf-8"), 5)
    path.write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match=r"r\.parquet: is damaged or incomplete after its beginning"):
        list(Reader(["text"], "utf-8").rows(file, piece))


def test_utf_8_with_a_byte_order_mark_is_an_encoding_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--folder", "in", "--output-folder", "out", "--encoding", "UTF-8-SIG"]
    monkeypatch.setattr(sys, "argv", ["predict", *options])
    check_arguments(arguments(None))
    assert folder_encoding("UTF-8-SIG") == "utf-8"


# --- processes --------------------------------------------------------------------------------------------------------


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    take_gpu(Process(rank=5, local_rank=1))
    assert taken == [1]
    with pytest.raises(UserError, match="process 3 of this machine has no GPU of its own: 2 can be seen"):
        take_gpu(Process(rank=6, local_rank=2))


def test_claims_of_different_pieces_do_not_touch(place: Workplace) -> None:
    with held(place, "take(7)"), ExitStack() as stack:
        claims = Claims(place.folder / "out")
        assert not claims.take(7)
        assert claims.take(6) and claims.take(8) and claims.take_run()
        assert not stack.enter_context(claims.all_pieces())
