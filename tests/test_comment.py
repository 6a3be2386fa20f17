"""One comment on a pull request, posted and updated through a real server on this machine that remembers."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from review.comment import CUT, MARKER, MOST_BYTES, MOST_CHARACTERS, body_of
from tests.forge_server import ACTIONS_TOKEN, GITLAB_TOKEN, HEAD, PERSONAL_TOKEN, READ_TOKEN, Forge, serve, variables

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def forge() -> Iterator[Forge]:
    with serve() as forge:
        yield forge


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "comment.md"
    path.write_text("## Review\n\nf1 is better\n", encoding="utf-8")
    return path


def comment(text: Path, environment: dict[str, str], *options: str, fails: bool = False) -> str:
    """Run review.comment without any installed package: -S leaves site-packages out."""
    arguments = options if "--request-file" in options else (*options, "--request", "12")
    result = subprocess.run(
        [sys.executable, "-S", "-m", "review.comment", str(text), *arguments],
        cwd=ROOT, env=environment | {"NO_PROXY": "127.0.0.1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode == 1) == fails, result.stderr
    assert "Traceback" not in result.stderr
    assert not any(token in result.stderr + result.stdout for token in (ACTIONS_TOKEN, GITLAB_TOKEN, READ_TOKEN))
    return result.stderr if fails else result.stdout


@pytest.mark.parametrize("token", [ACTIONS_TOKEN, PERSONAL_TOKEN, GITLAB_TOKEN])
def test_the_first_run_posts_and_the_next_one_updates(forge: Forge, text: Path, token: str) -> None:
    assert "posted" in comment(text, variables(forge, token), "--link", "https://example.org/plots")
    text.write_text("second", encoding="utf-8")
    assert "updated" in comment(text, variables(forge, token), "--link", "https://example.org/plots")
    [only] = forge.comments
    assert only["body"] == f"{MARKER}\n\n[Plots and the whole comparison](https://example.org/plots)\n\nsecond\n"


@pytest.mark.parametrize("token", [ACTIONS_TOKEN, GITLAB_TOKEN])
def test_an_earlier_comment_is_found_behind_many_others(forge: Forge, text: Path, token: str) -> None:
    comment(text, variables(forge, token))
    forge.comments[:0] = [{"id": number, "body": "hello", "user": None, "author": {}} for number in range(250)]
    text.write_text("second", encoding="utf-8")
    assert "updated" in comment(text, variables(forge, token))
    assert len(forge.comments) == 251
    assert forge.comments[-1]["body"].endswith("second\n")


def test_a_strangers_comment_with_the_marker_is_left_alone(forge: Forge, text: Path) -> None:
    forge.add("mallory", f"{MARKER} mine")
    assert "posted" in comment(text, variables(forge))
    assert forge.comments[0]["body"] == f"{MARKER} mine"
    assert len(forge.comments) == 2


def test_a_comment_of_a_workflow_that_is_not_ours_is_left_alone(forge: Forge, text: Path) -> None:
    forge.add("github-actions[bot]", f"coverage 90 %, see {MARKER}")
    assert "posted" in comment(text, variables(forge))


def test_a_text_that_is_too_long_is_cut_to_the_limit_with_nothing_left_open(forge: Forge, text: Path) -> None:
    text.write_text("<details>\n\n~~~text\n" + "line of a table\n" * 10_000, encoding="utf-8")
    comment(text, variables(forge))
    body = forge.comments[0]["body"]
    assert MOST_CHARACTERS - 400 < len(body) <= MOST_CHARACTERS
    assert body.endswith(f"line of a table\n~~~\n\n</details>{CUT}")


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        # Another sign, fewer of it, or words behind it do not end a block.
        ("~~~text\n```\n", "\n~~~"),
        ("````\n```\n", "\n````"),
        ("~~~\n~~~ text\n", "\n~~~"),
        ("  ~~~\n", "\n~~~"),
        # More of it does, and where none is open there is none to close.
        ("```\n`````  \n", ""),
        ("``` with a ` in it\n", ""),
        ("~~~\n</details>\n~~~\n<details>\n\n", "\n\n</details>"),
        ("~~~\n<details>\n~~~\n", ""),
        ("</details>\n\n<details>\n\n", "\n\n</details>"),
    ],
)
def test_a_cut_closes_the_block_that_is_open_and_no_other(opening: str, closing: str) -> None:
    body = body_of(opening + "line of a table\n" * 10_000, None, foreign=False)
    assert body.endswith(f"line of a table{closing}{CUT}")
    assert len(body) <= MOST_CHARACTERS


def test_of_a_block_whose_fence_is_too_long_to_be_closed_nothing_is_kept() -> None:
    fence = "~" * 40_000
    body = body_of(f"before\n{fence}text\nas {fence[:200]}\n" + "line\n" * 10_000, None, foreign=False)
    assert body == f"{MARKER}\n\nbefore{CUT}"


def test_a_text_of_one_endless_line_keeps_within_the_limit() -> None:
    body = body_of("x" * 100_000, None, foreign=False)
    assert len(body) <= MOST_CHARACTERS
    assert body.startswith(MARKER)
    assert body.endswith(CUT)


def test_a_text_within_the_limit_stays_whole() -> None:
    frame = len(body_of("x", None, foreign=False)) - 1
    assert CUT not in body_of("x" * (MOST_CHARACTERS - frame), None, foreign=False)
    assert CUT in body_of("x" * (MOST_CHARACTERS - frame + 1), None, foreign=False)


def test_names_in_the_data_notify_nobody_and_control_characters_are_dropped() -> None:
    body = body_of("@everyone, a@b\x00\x1b[31m \u202eleft", None, foreign=False)
    assert "@\u200beveryone" in body
    assert "@\u200bb" in body
    assert not set("\x00\x1b\u202e") & set(body)


@pytest.mark.parametrize(
    "name",
    [
        "@octocat", "&#64;octocat", "&#0064;octocat", "&#64octocat", "&#x40;octocat", "&#X0040;octocat",
        "&#x40octocat", "&commat;octocat", "@&#111;ctocat", "&#64;&#111;ctocat", "&#6\x004;octocat",
    ],
)  # fmt: skip
def test_a_name_behind_an_at_that_is_written_otherwise_notifies_nobody_either(name: str) -> None:
    shown = html.unescape(body_of(f"by {name}", None, foreign=False))
    assert shown.endswith("by \u200b@\u200boctocat\n")


@pytest.mark.parametrize("text", ["&#640;", "&#x400;", "&amp;#64;octocat", "&#65;", "&lt;"])
def test_other_entities_stay(text: str) -> None:
    assert body_of(text, None, foreign=False) == f"{MARKER}\n\n{text}\n"


def test_a_forks_text_is_posted_where_its_commit_is_the_newest_and_says_whose_it_is(forge: Forge, text: Path) -> None:
    number = text.with_name("number.txt")
    number.write_text("12\n")
    options = ("--request-file", str(number), "--head", HEAD, "--foreign")
    assert "posted" in comment(text, variables(forge), *options)
    assert "fork's own code" in forge.comments[0]["body"]


@pytest.mark.parametrize("token", [ACTIONS_TOKEN, GITLAB_TOKEN])
def test_nothing_is_posted_on_a_request_with_another_newest_commit(forge: Forge, text: Path, token: str) -> None:
    message = comment(text, variables(forge, token), "--head", "b" * 40, fails=True)
    assert f"its newest commit is {HEAD}, not {'b' * 40}" in message
    assert not forge.comments


@pytest.mark.parametrize("number", ["0", "-1", "12/../13", "1" * 11, "١٢", "12 13", "", "$(id)"])
def test_what_is_no_number_of_a_request_is_refused_before_anything_is_asked(
    forge: Forge, text: Path, number: str
) -> None:
    path = text.with_name("number.txt")
    path.write_text(number, encoding="utf-8")
    assert "must be the number" in comment(text, variables(forge), "--request-file", str(path), fails=True)
    assert not forge.requests


def test_an_artifact_that_is_a_link_is_refused(forge: Forge, text: Path) -> None:
    text.unlink()
    text.symlink_to("/proc/self/environ")
    assert "no such file, or a link" in comment(text, variables(forge), fails=True)
    assert not forge.requests


def test_of_a_huge_artifact_only_the_beginning_is_read(forge: Forge, text: Path) -> None:
    with text.open("wb") as file:
        file.write(b"\xff\xfe begin\n")
        file.truncate(2_000 * MOST_BYTES)  # of zeros, which need no disk
    comment(text, variables(forge))
    assert "begin" in forge.comments[0]["body"]


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((401, b'{"message": "Bad credentials"}', {}), "the token is not accepted (Bad credentials)"),
        ((403, b'{"message": "API rate limit exceeded"}', {"X-RateLimit-Reset": "1000000000"}), "after 01:46 UTC"),
        ((429, b"{}", {"Retry-After": "60"}), "Run this job again in 60 s"),
        ((404, b'{"message": "Not Found"}', {}), "not found, or the token may not see it"),
        ((301, b"{}", {"Location": "http://127.0.0.1:9/"}), "the server sends elsewhere"),
        ((502, b"<html>bad gateway</html>", {}), "the server answered 502"),
        ((200, b"<html>log in</html>", {}), "answers no JSON"),
    ],
)
def test_each_refusal_gets_one_message_that_says_what_helps(
    forge: Forge, text: Path, refusal: tuple[int, bytes, dict[str, str]], expected: str
) -> None:
    forge.refusal = refusal
    message = comment(text, variables(forge), fails=True)
    assert expected in message
    assert message.count("\n") == 1


def test_a_token_that_may_only_read_is_told_which_permission_it_lacks(forge: Forge, text: Path) -> None:
    assert "permissions: pull-requests: write" in comment(text, variables(forge, READ_TOKEN), fails=True)


def test_an_unknown_token_and_an_absent_one_are_told_apart(forge: Forge, text: Path) -> None:
    assert "not accepted" in comment(text, variables(forge) | {"GITHUB_TOKEN": "wrong"}, fails=True)
    assert "GITHUB_TOKEN is not set" in comment(text, variables(forge) | {"GITHUB_TOKEN": ""}, fails=True)
    broken = variables(forge) | {"GITHUB_TOKEN": "with\nline"}
    assert "GITHUB_TOKEN holds what no header can hold" in comment(text, broken, fails=True)


def test_outside_of_a_forge_there_is_nowhere_to_post(text: Path) -> None:
    assert "nowhere to post" in comment(text, {}, fails=True)


def test_a_server_that_cannot_be_reached_gets_one_message(text: Path) -> None:
    with serve() as forge:
        environment = variables(forge)
    assert "cannot be reached" in comment(text, environment, fails=True)


@pytest.mark.parametrize("address", ["api.github.com", "//api.github.com", "ftp://host", "https://", "http://[::1"])
@pytest.mark.parametrize("name", ["GITHUB_API_URL", "CI_API_V4_URL"])
def test_an_address_that_is_none_is_named_with_its_variable(text: Path, name: str, address: str) -> None:
    with serve() as forge:
        environment = variables(forge, ACTIONS_TOKEN if name == "GITHUB_API_URL" else GITLAB_TOKEN)
    message = comment(text, environment | {name: address}, fails=True)
    assert message == f"error: {name}: {address!r} must be an address as https://HOST/PATH\n"


def test_a_next_page_on_another_server_never_sees_the_token(forge: Forge, text: Path) -> None:
    forge.comments = [{"id": number, "body": "hello", "user": None} for number in range(150)]
    with serve() as other:
        forge.next_link = f"{other.address}/repos/owner/name/issues/12/comments?per_page=100&page=2"
        assert "posted" in comment(text, variables(forge))
        assert not other.requests


def test_the_server_refuses_what_github_refuses(forge: Forge) -> None:
    # Otherwise the test of the limit would prove nothing.
    import urllib.error
    import urllib.request

    sent = urllib.request.Request(
        f"{forge.address}/repos/owner/name/issues/12/comments",
        json.dumps({"body": "x" * (MOST_CHARACTERS + 1)}).encode(), {"Authorization": f"Bearer {ACTIONS_TOKEN}"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="422"):
        urllib.request.urlopen(sent)
