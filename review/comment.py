"""Post a text as the one comment of this project on a pull or merge request, or update it: `python -m review.comment`.

For GitHub GITHUB_API_URL, GITHUB_REPOSITORY and GITHUB_TOKEN are read; for GitLab CI_API_V4_URL, CI_PROJECT_ID and
REVIEW_TOKEN. Needs no package at all, so that whoever holds the token runs nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from review.forges import AnswerError, Request, call, refusal, the_request
from stages.common.errors import UserError, run_stage

# Hidden in a rendered comment; how an earlier one of ours is found.
MARKER = "<!-- review of this pull request -->"
# GitHub refuses longer ones (GitLab's limit is 1,000,000).
MOST_CHARACTERS = 65_536
# More of a file is not read: a fork's artifact may hold anything.
MOST_BYTES = 1_000_000
# Control characters, and those that turn the direction of the text behind them.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Kept free for the note, and for closing what the cut leaves open: a fence and eight of GitHub's <details>.
ROOM = 300
LONGEST_FENCE = 100
# What Markdown and HTML show as an @, whose semicolon HTML does not insist on.
AT = re.compile("&#0*64(?![0-9]);?|&#x0*40(?![0-9a-f]);?|&commat;|@", flags=re.IGNORECASE)
FENCE = re.compile(" {0,3}(`{3,}|~{3,})(.*)")
CUT = "\n\n*The rest does not fit into a comment: it is in the artifact.*\n"
# GitHub answers a workflow's own token so when it asks who it is.
ACTIONS_ACCOUNT = "github-actions[bot]"


def body_of(text: str, link: str | None, foreign: bool) -> str:
    """A comment's body: marker, text, link, and never longer than GitHub takes.

    Args:
        text: Markdown. It notifies nobody: a name behind an @ is one of the data's, not one of the forge's.
        link: where plots and artifacts are.
        foreign: whether a fork's own code wrote the text, which readers are then told.
    """
    head = [MARKER]
    if foreign:
        head.append("*Computed by the fork's own code, in a run without secrets: read the change before the numbers.*")
    if link:
        head.append(f"[Plots and the whole comparison]({link})")
    shown = AT.sub("\u200b@\u200b", UNSHOWABLE.sub("", text))
    body = "\n\n".join([*head, shown.strip()]) + "\n"
    if len(body) <= MOST_CHARACTERS:
        return body
    kept = body[: MOST_CHARACTERS - ROOM].rpartition("\n")[0]
    fence, details = left_open(kept)
    while len(fence) > LONGEST_FENCE:
        # Such a line would not fit in once more: nothing of its block is kept.
        kept = kept[: kept.rindex(fence)].rstrip()
        fence, details = left_open(kept)
    kept += f"\n{fence}" if fence else ""
    return kept + "\n\n</details>" * min(8, details) + CUT


def left_open(text: str) -> tuple[str, int]:
    """The fence that closes the block of code at a text's end, if it ends in one, and how many <details> are open.

    A block ends with a line of nothing but its own sign, at least as often
    (https://spec.commonmark.org/0.31.2/#fenced-code-blocks).
    """
    fence, details = "", 0
    for line in text.split("\n"):
        found = FENCE.fullmatch(line)
        if fence:
            closes = found and found[1].startswith(fence) and not found[2].strip()
            fence = "" if closes else fence
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
        else:
            details = max(0, details + line.count("<details") - line.count("</details>"))
    return fence, details


def post(request: Request, body: str) -> str:
    """Update our earlier comment, or write the first one.

    Only a comment of the token's own account is touched: anybody can write one with the marker.

    Returns:
        "posted" or "updated".
    """
    account, page = own_account(request), f"{request.comments}?per_page=100"
    while page:
        comments, following = call(request, "GET", page)
        for comment in comments:
            author = comment.get("user") or comment.get("author") or {}
            if account in (author.get("login"), author.get("username")) and comment["body"].startswith(MARKER):
                call(request, request.update, f"{request.one_comment}{comment['id']}", {"body": body})
                return "updated"
        page = following
    call(request, "POST", request.comments, {"body": body})
    return "posted"


def own_account(request: Request) -> str:
    """Login of the account that the token belongs to."""
    try:
        user, _ = call(request, "GET", "/user")
    except AnswerError as error:
        if error.status == 403 and "limit" not in str(error).lower():
            return ACTIONS_ACCOUNT
        raise
    return str(user.get("login") or user.get("username"))


def check_head(request: Request, head: str) -> None:
    """Refuse to comment on another pull request than the one whose commit was looked at.

    Raises:
        UserError: its newest commit is another.
    """
    found, _ = call(request, "GET", request.description)
    newest = found["head"]["sha"] if "head" in found else found["sha"]
    if newest != head:
        raise UserError(
            f"{request.description}: its newest commit is {newest}, not {head}, which was reviewed. Nothing was "
            "posted: either it has newer commits, whose own run posts, or another pull request was reviewed."
        )


def read_text(path: Path) -> str:
    """A file's text, at most its first MOST_BYTES.

    Raises:
        UserError: there is no such file, or it is a link, which could lead to a secret.
    """
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: no such file, or a link. `python -m review.pull_request` writes it.")
    with path.open("rb") as file:
        return file.read(MOST_BYTES).decode(errors="replace")


def request_number(text: str) -> int:
    """The number of a pull request.

    Raises:
        UserError: it is none.
    """
    text = text.strip()
    if not re.fullmatch("[1-9][0-9]{0,9}", text):
        raise UserError(f"{text[:40]!r}: must be the number of a pull or merge request, as 12")
    return int(text)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m review.comment", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown")
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--request", metavar="NUMBER", help="of the pull request; the IID of a merge request")
    number.add_argument("--request-file", type=Path, metavar="FILE", help="holds that number")
    parser.add_argument("--head", metavar="SHA", help="commit that was reviewed: post only if it is still the newest")
    parser.add_argument("--link", metavar="URL", help="to plots and artifacts")
    parser.add_argument("--foreign", action="store_true", help="a fork's code wrote FILE: say so")
    return parser.parse_args()


def main() -> None:
    """Post or update the comment."""
    options = arguments()
    number = request_number(options.request or read_text(options.request_file))
    request = the_request(number, dict(os.environ))
    body = body_of(read_text(options.file), options.link, options.foreign)
    try:
        if options.head:
            check_head(request, options.head)
        done = post(request, body)
    except AnswerError as error:
        raise UserError(refusal(request, error)) from None
    print(f"comment: {done} on {request.description}, {len(body):,} characters")


if __name__ == "__main__":
    run_stage(main)
