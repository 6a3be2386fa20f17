"""Say what a change did: `python -m review.compare [REV_A] [REV_B]` compares two revisions row by row.

Parameters, data, each metric with a paired interval and test, labels, flipped rows. Reads the predictions of both sides
out of the working tree, the cache or the remote, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# Comes with scikit-learn, which needs it.
from threadpoolctl import threadpool_limits

from review.document import page_of
from review.entries import Entry
from review.git import merge_base
from review.rendering import html_page, markdown_page
from review.result import compare_sides
from review.revisions import IncomparableError, NoResultsError, open_repository, read_side
from review.verdicts import UNKNOWN, WITHHELD, WORSE
from stages.common.errors import UserError, run_stage
from stages.common.tables import write_text

REGRESSION, INCOMPARABLE = 3, 4


def regressions(result: Entry, names: list[str]) -> list[str]:
    """Those of the named metrics that are significantly worse.

    Args:
        result: of the comparison.
        names: metrics.

    Raises:
        UserError: a name is no metric of this comparison, or nothing can be said about it.
    """
    metrics = result["metrics"]
    allowed = [name for name, entry in metrics.items() if entry["verdict"] is not None]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        known = ", ".join(allowed) if allowed else "none, since one side has no numbers"
        raise UserError(
            f"--fail-on-regression: {', '.join(unknown)} is none of the metrics to be judged here: {known}."
        )
    unjudged = [name for name in names if metrics[name]["verdict"] in (UNKNOWN, WITHHELD)]
    if unjudged:
        raise UserError(f"--fail-on-regression: {', '.join(unjudged)} cannot be judged. {result['verdict']['text']}")
    return [name for name in names if metrics[name]["verdict"] == WORSE]


def shown(result: Entry, form: str) -> str:
    """The result as `markdown`, `html` or `json`, with a line break at its end."""
    if form == "json":
        return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "html":
        return html_page(page_of(result), f"{result['before']['title']} and {result['after']['title']}")
    return markdown_page(page_of(result))


def print_page(page: str) -> None:
    """Print it all, or as much as a pager that was left wanted to have."""
    try:
        print(page, end="", flush=True)
    except BrokenPipeError:
        # Python writes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def checked_output(path: Path) -> Path:
    """The file that is to be written, behind any links.

    Raises:
        UserError: it is there and no file: a folder, a device or a pipe, which a whole file would replace.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(
            f"--output: {path} is no regular file, and would be replaced by one. Name another one; without "
            "--output the page is printed, and `>` or `|` sends it anywhere."
        )
    return target


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m review.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"Exit code: 0; 1 with one message for what a user can mend; {REGRESSION} with --fail-on-regression;\n"
            f"{INCOMPARABLE} with one message where two revisions cannot be compared: they have different tasks or "
            "labels, or REV_A\nhas no results yet."
        ),
    )
    parser.add_argument("before", nargs="?", metavar="REV_A", help="default: where HEAD left main")
    parser.add_argument("after", nargs="?", metavar="REV_B", help="default: the working tree")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="everything, for scripts")
    form.add_argument("--html", action="store_const", const="html", dest="form", help="one page that loads nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--fail-on-regression", nargs="+", default=[], metavar="METRIC",
        help=f"exit with {REGRESSION} when one of these is significantly worse; behind the revisions",
    )  # fmt: skip
    parser.set_defaults(form="markdown")
    return parser.parse_args()


def comparison(options: argparse.Namespace) -> Entry:
    """The result for both revisions.

    Raises:
        IncomparableError: they are about different tasks, or the first one has no results yet.
        UserError: a revision is unknown, or a file of it is not usable.
    """
    repo = open_repository()
    try:
        before = read_side(repo, merge_base() if options.before is None else options.before)
    except NoResultsError as error:
        raise IncomparableError(str(error)) from None
    after = read_side(repo, options.after)
    # The products are small: more threads than one wait for each other, twice the processor time on two busy cores.
    with threadpool_limits(1), tempfile.TemporaryDirectory(prefix="compare-") as folder:
        return compare_sides(repo, before, after, Path(folder))


def main() -> None:
    """Print or write the comparison."""
    options = arguments()
    output = None if options.output is None else checked_output(options.output)
    try:
        result = comparison(options)
    except IncomparableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INCOMPARABLE)
    page = shown(result, options.form)
    if output is None:
        print_page(page)
    else:
        write_text(output, page)
        print(f"compare: {options.output}: {result['verdict']['text']}")
        for caution in result["cautions"]:
            print(f"caution: {caution}", file=sys.stderr)
    worse = regressions(result, options.fail_on_regression)
    if worse:
        print(f"compare: significantly worse: {', '.join(worse)}", file=sys.stderr)
        sys.exit(REGRESSION)


if __name__ == "__main__":
    run_stage(main)
