"""`dvc plots diff` of two commits, drawn by headless Chromium without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pandas as pd
import pytest
from PIL import Image

from review.plots import page
from tests.project import ROOT, Project

CHROMIUM = shutil.which("chromium")
OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--window-size=1400,3300"),
)
SVG = "{http://www.w3.org/2000/svg}"
# DVC's colours of the first and the second revision.
COLOURS = {"before": "#945dd6", "after": "#13adc7"}
CURVES = ("loss", "precision_recall", "roc", "reliability", "coverage")


class Page(NamedTuple):
    """A page as the browser drew it: each plot by its table's name, and the picture."""

    plots: dict[str, ElementTree.Element]
    picture: Path


def python(project: Project, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module of this repository in the project, with pip as this machine has it set up."""
    values = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project.folder, env=values, capture_output=True, text=True, check=False)


def texts(plot: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in plot.iter(f"{SVG}text")]


def marks(plot: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    """The marks of a kind, `rect` or `line`, in a plot or a part of one."""
    groups = [group for group in plot.iter(f"{SVG}g") if f"mark-{kind} role-mark" in group.get("class", "")]
    return [path for group in groups for path in group.iter(f"{SVG}path")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """This repository's plots and results, and a commit with other numbers; nothing is trained."""
    project = Project(tmp_path_factory.mktemp("plots") / "repository")
    project.folder.mkdir()
    for name in ("metrics", ".dvc/plots"):
        shutil.copytree(ROOT / name, project.folder / name, ignore=shutil.ignore_patterns("page.html"))
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, project.folder / name)
    project.git("init", "-q", "-b", "main")
    project.git("add", "-A")
    project.git("commit", "-qm", "Before")
    project.git("tag", "before")
    tables = project.folder / "metrics/evaluation"
    for name, column, factor in (("confusion", "count", 2), *((f"{name}", None, 0.9) for name in CURVES)):
        table = pd.read_csv(tables / f"{name}.csv")
        column = column or table.columns[2]
        table[column] = (table[column] * factor).round(4)
        table.to_csv(tables / f"{name}.csv", index=False)
    project.git("commit", "-qam", "After")
    project.git("tag", "after")
    return project


@pytest.fixture(scope="module")
def template(project: Project) -> Path:
    """The page template, with the library that pip fetched."""
    result = python(project, "review.plots")
    if "no package index could be reached" in result.stderr:
        pytest.skip("the drawing library comes out of a package index, and none can be reached")
    assert result.returncode == 0, result.stderr
    return project.folder / ".dvc/plots/page.html"


@pytest.fixture(scope="module")
def drawn(project: Project, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The difference of the two commits in Chromium, which reaches no other machine."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt install chromium")
    project.dvc("plots", "diff", "before", "after")
    folder = tmp_path_factory.mktemp("chromium")
    address = (project.folder / "dvc_plots/index.html").as_uri()
    command = [CHROMIUM, *OFFLINE, f"--user-data-dir={folder / 'profile'}"]
    picture = folder / "plots.png"
    subprocess.run([*command, f"--screenshot={picture}", address], capture_output=True, check=True, timeout=60)
    dump = subprocess.run(
        [*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found = re.findall(r'<div id="metrics_evaluation_(\w+)_csv".*?(<svg [^>]*class="marks".*?</svg>)', dump, re.DOTALL)
    return Page({name: ElementTree.fromstring(svg) for name, svg in found}, picture)


def test_without_the_set_up_the_page_is_dvcs_own_and_loads_from_the_network(project: Project) -> None:
    project.dvc("plots", "diff", "before", "after", "-o", "plain")
    assert '<script src="https://' in (project.folder / "plain/index.html").read_text(encoding="utf-8")
    shutil.rmtree(project.folder / "plain")


def test_a_library_that_cannot_be_fetched_ends_in_one_message_and_changes_nothing(
    project: Project, tmp_path: Path
) -> None:
    result = python(project, "review.plots", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert result.returncode == 1
    assert "error: the library that draws plots could not be fetched: django-js-lib-vega-embed==" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (project.folder / ".dvc/config.local").exists()
    assert "no DVC repository" in python(Project(tmp_path), "review.plots").stderr


def test_a_library_that_would_break_out_of_the_page_is_not_put_into_it() -> None:
    with pytest.raises(AssertionError):
        page("var end = '</SCRIPT>';")


def test_the_set_up_is_kept_out_of_git(project: Project, template: Path) -> None:
    assert template.is_file()
    assert project.git("status", "--porcelain") == ""


def test_the_page_holds_all_it_needs(project: Project, drawn: Page) -> None:
    code = (project.folder / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in code
    without_scripts = re.sub(r"<script[^>]*>.*?</script>", "", code, flags=re.DOTALL)
    assert not re.search(r"<script[^>]+>|(src|href|url)\W*[=(]", without_scripts)
    assert "<script src" not in code
    assert set(drawn.plots) == {path.stem for path in (project.folder / "metrics/evaluation").glob("*.csv")}


def test_the_confusion_matrices_stand_side_by_side_with_their_counts(project: Project, drawn: Page) -> None:
    plot = drawn.plots["confusion"]
    counts = pd.read_csv(project.folder / "metrics/evaluation/confusion.csv")["count"].astype(int)
    shown = texts(plot)
    assert {"before", "after"} <= set(shown)
    assert len(marks(plot, "rect")) == 2 * len(counts)
    numbers = [text for text in shown if text.isdecimal()]
    for count in counts:
        assert numbers.count(str(count)) >= 1 and numbers.count(str(count // 2)) >= 1
    [cells] = [group for group in plot.iter(f"{SVG}g") if "role-scope cell" in group.get("class", "")]
    assert [len(marks(cell, "rect")) for cell in cells] == [len(counts)] * 2
    left, right = (str(cell.get("transform")) for cell in cells)
    assert left == "translate(0,0)"
    assert re.fullmatch(r"translate\(3\d\d(\.\d+)?,0\)", right)  # matrices are 300 wide


@pytest.mark.parametrize("name", CURVES)
def test_curves_show_both_revisions_in_their_colours_for_each_series(project: Project, drawn: Page, name: str) -> None:
    series = pd.read_csv(project.folder / f"metrics/evaluation/{name}.csv")["series"].unique()
    lines = marks(drawn.plots[name], "line")
    strokes = [line.get("stroke") for line in lines]
    assert {name: strokes.count(colour) for name, colour in COLOURS.items()} == dict.fromkeys(COLOURS, len(series))
    assert all(re.fullmatch(r"M[-\d.,e]+(L[-\d.,e]+)+", line.get("d", "")) for line in lines)
    assert {*COLOURS, *series} <= set(texts(drawn.plots[name]))


@pytest.mark.parametrize("name", ["per_class_f1", "misclassified"])
def test_bars_show_both_revisions_in_their_colours(project: Project, drawn: Page, name: str) -> None:
    rows = len(pd.read_csv(project.folder / f"metrics/evaluation/{name}.csv"))
    fills = [bar.get("fill") for bar in marks(drawn.plots[name], "rect")]
    assert {name: fills.count(colour) for name, colour in COLOURS.items()} == dict.fromkeys(COLOURS, rows)
    assert set(COLOURS) <= set(texts(drawn.plots[name]))


def test_the_screenshot_has_both_revisions_colours(drawn: Page) -> None:
    with Image.open(drawn.picture) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24) or []}
    for colour in COLOURS.values():
        assert colours[tuple(bytes.fromhex(colour[1:]))] > 1_000  # pixels
