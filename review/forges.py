"""The APIs of GitHub and GitLab, as far as comments on a pull or merge request need them; standard library only."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from stages.common.errors import UserError

TIMEOUT_SECONDS = 30


class Request(NamedTuple):
    """A pull request of GitHub, or merge request of GitLab, and how to talk about it.

    Attributes:
        api: the API's address.
        headers: with the token.
        description: path of the request itself.
        comments: path of its comments.
        one_comment: path of one comment, ID left open.
        update: method that changes one.
        needed: what a token has to be allowed.
    """

    api: str
    headers: dict[str, str]
    description: str
    comments: str
    one_comment: str
    update: str
    needed: str


class AnswerError(Exception):
    """The server refused."""

    def __init__(self, status: int, message: str, headers: Any) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    # It would take the token along, to whatever host the answer names.
    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def the_request(number: int, environment: dict[str, str]) -> Request:
    """How to reach a pull or merge request from inside a job of its forge.

    Args:
        number: GitHub's number, or GitLab's IID.
        environment: the process's variables.

    Raises:
        UserError: it belongs to neither forge, or there is no token, or the API's address is none.
    """
    if environment.get("GITHUB_REPOSITORY"):
        repository, token = environment["GITHUB_REPOSITORY"], _token(environment, "GITHUB_TOKEN")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise UserError(f"GITHUB_REPOSITORY: {repository!r} must be OWNER/NAME")
        return Request(
            api=_address("GITHUB_API_URL", environment.get("GITHUB_API_URL") or "https://api.github.com"),
            headers={"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"},
            description=f"/repos/{repository}/pulls/{number}",
            comments=f"/repos/{repository}/issues/{number}/comments",
            one_comment=f"/repos/{repository}/issues/comments/",
            update="PATCH",
            needed="the job needs `permissions: pull-requests: write`; a fork's own run never has it",
        )
    if environment.get("CI_API_V4_URL") and environment.get("CI_PROJECT_ID"):
        path = f"/projects/{environment['CI_PROJECT_ID']}/merge_requests/{number}"
        return Request(
            api=_address("CI_API_V4_URL", environment["CI_API_V4_URL"]),
            headers={"PRIVATE-TOKEN": _token(environment, "REVIEW_TOKEN")},
            description=path,
            comments=f"{path}/notes",
            one_comment=f"{path}/notes/",
            update="PUT",
            needed="REVIEW_TOKEN has to be a project access token with the scope `api` and at least the role Reporter",
        )
    raise UserError(
        "neither GITHUB_REPOSITORY nor CI_API_V4_URL and CI_PROJECT_ID are set, so there is nowhere to post. The file "
        "itself can be read anywhere."
    )


def call(request: Request, method: str, path: str, content: dict[str, str] | None = None) -> tuple[Any, str]:
    """One request to the API.

    Args:
        request: where to, with which token.
        method: of HTTP.
        path: behind the API's address.
        content: sent as JSON.

    Returns:
        The answer, and the path of the next page, empty where there is none.

    Raises:
        AnswerError: the server refused.
        UserError: it cannot be reached, or is no such API.
    """
    data = json.dumps(content).encode() if content is not None else None
    headers = request.headers | {"User-Agent": "review.comment", "Content-Type": "application/json"}
    sent = urllib.request.Request(request.api + path, data, headers, method=method)
    try:
        with urllib.request.build_opener(_NoRedirects).open(sent, timeout=TIMEOUT_SECONDS) as answer:
            return json.load(answer), next_page(request.api, answer.headers.get("Link") or "")
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(10_000).decode(errors="replace")
        try:
            said = json.loads(said)["message"]
        except (ValueError, KeyError, TypeError):
            said = said[:300]
        raise AnswerError(error.code, str(said), error.headers) from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{request.api}: cannot be reached ({error}). Check the network and the proxy, then run this again."
        ) from None
    except ValueError:
        raise UserError(f"{request.api}: answers no JSON, so it is no API of GitHub or GitLab.") from None


def next_page(api: str, link: str) -> str:
    """The path that a Link header calls next; empty where there is none, or where it leads to another server."""
    match = re.search(r'<([^<>]+)>\s*;\s*rel="next"', link)
    if not match or not match[1].startswith(f"{api}/"):
        return ""
    return match[1].removeprefix(api)


def refusal(request: Request, error: AnswerError) -> str:
    """One message about what the server refused, and what helps."""
    where, said = f"{request.api}{request.description}", str(error)
    if error.status == 429 or (error.status == 403 and "limit" in said.lower()):
        return f"{where}: too many requests ({said}). Run this job again {_when(error.headers)}."
    if error.status == 401:
        return f"{where}: the token is not accepted ({said}). It is wrong, expired or of another server."
    if error.status == 403:
        return f"{where}: the token may not comment there ({said}); {request.needed}."
    if error.status == 404:
        return f"{where}: not found, or the token may not see it ({said}); {request.needed}."
    if error.status // 100 == 3:
        return f"{where}: the server sends elsewhere, as for a renamed repository. Set the new name."
    return f"{where}: the server answered {error.status} ({said}). Nothing was posted; run this job again later."


def _address(name: str, value: str) -> str:
    try:
        # It refuses a broken host in brackets.
        valid = urllib.parse.urlsplit(value).hostname and re.fullmatch("https?://[!-~]+", value)
    except ValueError:
        valid = None
    if not valid:
        raise UserError(f"{name}: {value!r} must be an address as https://HOST/PATH")
    return value.rstrip("/")


def _token(environment: dict[str, str], name: str) -> str:
    token = environment.get(name, "")
    if not token or not token.isascii() or not token.isprintable():
        state = "holds what no header can hold" if token else "is not set"
        raise UserError(f"{name} {state}: there is no token to comment with. docs/ci.md says which one it takes.")
    return token


def _when(headers: Any) -> str:
    seconds, reset = headers.get("Retry-After", ""), headers.get("X-RateLimit-Reset", "")
    if seconds.isdigit():
        return f"in {seconds} s"
    return f"after {time.strftime('%H:%M UTC', time.gmtime(int(reset)))}" if reset.isdigit() else "later"
