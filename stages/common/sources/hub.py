"""Files of a repository on the Hugging Face Hub, at a commit; the token comes from HF_TOKEN and goes nowhere else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from stages.common.errors import UserError

RepositoryType = Literal["model", "dataset"]


def require_commit(repo_id: str, revision: str, repo_type: RepositoryType, key: str) -> None:
    """Refuse a revision that can move, and name the commit it points to now.

    Args:
        repo_id: OWNER/NAME.
        revision: what params.yaml says.
        repo_type: model or dataset.
        key: where params.yaml says it, for the message.

    Raises:
        UserError: `revision` is not the 40 hexadecimal digits of a commit.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return
    try:
        now = f"It points to {current_commit(repo_id, revision, repo_type)} now: put that there."
    except UserError as error:
        now = f"Which commit it is now could not be found out: {error}"
    raise UserError(
        f"{key}: {revision!r} is not a commit of 40 hexadecimal digits, and can point to something else tomorrow. {now}"
    )


def current_commit(repo_id: str, revision: str, repo_type: RepositoryType) -> str:
    """The commit that a branch or tag points to now.

    Raises:
        UserError: the Hub cannot be reached, or does not have or show it.
    """
    from huggingface_hub import HfApi

    with _clear_errors(repo_id, repo_type):
        information = HfApi(token=_token()).repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=30)
    assert information.sha is not None
    return information.sha


def download_repository(
    repo_id: str,
    revision: str,
    repo_type: RepositoryType,
    patterns: list[str],
    folder: Path | None = None,
    unwanted: list[str] | None = None,
) -> Path:
    """Download a repository's files that match a pattern.

    Args:
        repo_id: OWNER/NAME.
        revision: a commit; see `require_commit`.
        repo_type: model or dataset.
        patterns: names or patterns as in `fnmatch`, where * crosses folders too.
        folder: where to write; None: the Hub's own cache, which the next run finds again. An interrupted download goes
            on from its finished files either way.
        unwanted: patterns of files that are left out although `patterns` match them.

    Returns:
        The folder that holds the files under their paths in the repository.

    Raises:
        UserError: the Hub cannot be reached, or does not have or show the repository.
    """
    from huggingface_hub import snapshot_download

    with _clear_errors(repo_id, repo_type):
        found = snapshot_download(
            repo_id,
            revision=revision,
            repo_type=repo_type,
            allow_patterns=patterns,
            ignore_patterns=unwanted,
            local_dir=folder,
            token=_token(),
        )
    if folder is not None:
        # The Hub's notes on finished files; once all are there they would only be in the way.
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    return Path(found)


def _token() -> str | Literal[False]:
    # False keeps huggingface_hub from looking for a token that was stored on this machine.
    return os.environ.get("HF_TOKEN") or False


@contextmanager
def _clear_errors(repo_id: str, repo_type: RepositoryType) -> Iterator[None]:
    """Turn what the Hub answers into one message that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    token = "the token in HF_TOKEN" if _token() else "no token (HF_TOKEN is not set)"
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot name a repository on the Hub: {error}") from None
    except errors.GatedRepoError:
        reason = (
            "and the account of the token in HF_TOKEN was not let in. Accept the licence on that page with that "
            "account (some owners then look at each request), and let a fine-grained token read gated repositories."
            if _token()
            else "and HF_TOKEN is not set. Accept the licence on that page, then set HF_TOKEN to a token of the same "
            f"account with read access, from {constants.ENDPOINT}/settings/tokens."
        )
        raise UserError(f"{page}: is only for accounts that accepted its licence, {reason}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{page}: there is no such {repo_type}, or it is private; asked with {token}. Check the name; for a "
            "private one set HF_TOKEN to a token that may read it."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{page}: has no such revision. Choose a commit from {page}/commits/main.") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        status = _status_code(error)
        if status == 401:
            raise UserError(f"{page}: {token} is not accepted. Make a new one with read access.") from None
        if status == 403:
            raise UserError(
                f"{page}: {token} may not read it (403). Accept the licence on that page if it asks for that, and let "
                f"a fine-grained token read public gated repositories: {constants.ENDPOINT}/settings/tokens."
            ) from None
        reason = next(line for line in str(error).splitlines() if line.strip())[:300]
        raise UserError(
            f"{page}: could not be fetched ({reason}). Check the network, the proxy, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "then run the same command again."
        ) from None


def _status_code(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; huggingface_hub wraps a refused file into one about its local cache."""
    while error is not None:
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
