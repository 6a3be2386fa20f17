"""Push models/adapter with its model card to a Hugging Face Hub repository: `python -m serving.push OWNER/NAME`.

On demand only, in one commit, and nothing but the adapter's own files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, errors, get_token
from huggingface_hub.utils import validate_repo_id

from stages.base_model import TOKENIZER_FILES
from stages.common.errors import UserError, listing, run_stage
from stages.common.tables import read_json

ADAPTER = Path("models/adapter")
CARD = Path("metrics/model_card.md")
DESCRIPTIONS = ("prompt.json", "base.json", "provenance.json", "README.md")
NEEDED_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", *DESCRIPTIONS)
# As in fnmatch, where * crosses folders too.
ADAPTER_FILES = (*NEEDED_FILES, *TOKENIZER_FILES, "training_log/*.json", "training_log/*.tsv")


def adapter_files(folder: Path, links_are_ours: bool) -> dict[str, Path]:
    """The files of an adapter by their path inside `folder`.

    Args:
        folder: models/adapter.
        links_are_ours: whether links that lead out of the folder may be followed, since what they lead to has the
            hash in dvc.lock: DVC itself links outputs into its cache with `cache.type symlink`.

    Raises:
        UserError: there is no adapter, it lacks a file, or there is something beside it that must not be published.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: there is no adapter. `dvc repro finetune` makes it; `dvc pull {folder}` fetches the one that "
            "dvc.lock names."
        )
    found = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *names)):
            name = path.relative_to(folder).as_posix()
            outside = not path.resolve().is_relative_to(folder.resolve())
            # DVC links files, never folders.
            if outside and (path.is_dir() or not links_are_ours):
                raise UserError(f"{path}: is a link to something outside {folder}. Nothing was pushed: move it away.")
            if path.is_file():
                found[name] = path
    foreign = sorted(name for name in found if not is_adapter_file(name))
    if foreign:
        raise UserError(
            f"{folder}: holds what is no part of an adapter: {listing(foreign)}. Nothing was pushed: move it away."
        )
    missing = [name for name in NEEDED_FILES if name not in found]
    if missing:
        raise UserError(f"{folder}: lacks {listing(missing)}. Restore it with `dvc checkout {folder}` or `dvc pull`.")
    return found


def is_adapter_file(name: str) -> bool:
    """Whether a path in the folder or repository is one of those that `finetune` writes; hidden files never are."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and any(fnmatch(name, pattern) for pattern in ADAPTER_FILES)


def check_card(card: Path, adapter_card: Path) -> None:
    """Refuse a model card that is absent or tells another adapter's results.

    Raises:
        UserError: the card is absent, or does not contain the text of the adapter's own card.
    """
    if not card.is_file():
        raise UserError(f"{card}: there is no model card. `dvc repro report` makes it.")
    own = ModelCard(adapter_card.read_text(encoding="utf-8")).text.strip()
    if own not in card.read_text(encoding="utf-8"):
        raise UserError(f"{card}: tells the results of another adapter than {ADAPTER} holds. Run `dvc repro report`.")


def locked_hash(folder: Path) -> str | None:
    """The hash under which dvc.lock names an output; None where it names none, or not what the folder holds now."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            [output] = repo.find_outs_by_path(str(folder))
            return None if output.workspace_status() else str(output.hash_info.value)
    except DvcException:
        return None


def warnings_of(adapter: Path, hash_in_lock: str | None) -> list[str]:
    """What readers of the repository will miss, or see though it may not be meant for them."""
    source, exemplars = read_json(adapter / "base.json")["source"], read_json(adapter / "prompt.json")["exemplars"]
    found = []
    if hash_in_lock is None:
        found.append(
            f"{adapter} is not what dvc.lock names, so no commit of this project will lead to it: `dvc repro` first, "
            "or `dvc checkout` for the committed one"
        )
    if source["source"] == "folder":
        found.append(
            f"the base model came from a folder named {source['path']!r} on the machine that trained, so the card "
            "cannot say where others find it; base.json has the hashes of its files"
        )
    if exemplars:
        found.append(f"prompt.json shows the {len(exemplars)} texts of the data that stand in each prompt as examples")
    return found


def push(
    api: HfApi, repo_id: str, files: dict[str, Path], private: bool, message: str, details: str
) -> tuple[CommitInfo, bool]:
    """Make a repository hold these files, in one commit.

    Args:
        api: with endpoint and token.
        repo_id: OWNER/NAME; made where it does not exist.
        files: what to upload, by path in the repository. Of an earlier push, files that are not among them are
            deleted; other files of the repository stay.
        private: make it private, and refuse one that exists and is public.
        message: first line of the commit's message.
        details: its further lines.

    Returns:
        The commit, and whether it is new; equal files make none.
    """
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    before = api.model_info(repo_id)
    if private and not before.private:
        raise UserError(
            f"{api.endpoint}/{repo_id}: exists and is public. Nothing was pushed: make it private in its settings, "
            "choose another name, or leave out --private."
        )
    stale = [name for name in api.list_repo_files(repo_id) if is_adapter_file(name) and name not in files]
    # Not upload_folder: through Xet it makes several commits where it sees fit, and decides itself what to take.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=message,
        commit_description=details,
    )
    return commit, commit.oid != before.sha


@contextmanager
def clear_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn what the Hub answers into one message that says what to do."""
    page = f"{api.endpoint}/{repo_id}"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{page}: cannot be reached with HF_HUB_OFFLINE set. Unset it and run again.") from None
    except (errors.HTTPError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # Of this machine, not of the Hub; Xet's errors have no number.
            raise
        # Uploads of weights by Git LFS raise a RuntimeError from what went wrong.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:300]
        if status == 401:
            raise UserError(
                f"{page}: the token is not accepted. Make one with write access at {api.endpoint}/settings/tokens, "
                "and set HF_TOKEN to it or log in with `hf auth login`."
            ) from None
        if status in (403, 404):
            raise UserError(f"{page}: {refusal(api, repo_id)} The Hub says: {reason}") from None
        raise UserError(
            f"{page}: the push was not finished ({reason}). Check the network, the proxy and HF_ENDPOINT, then run the "
            "same command again: a push becomes visible with its last step, or not at all."
        ) from None
    except ValueError as error:
        if "metadata in README.md" not in str(error):
            raise
        raise UserError(f"{CARD}: the Hub refuses its metadata ({' '.join(str(error).split())[:300]}).") from None


def refusal(api: HfApi, repo_id: str) -> str:
    """Why an account may not write to a repository, as far as its token tells."""
    try:
        account = api.whoami()
    except errors.HTTPError:
        return "the token may not write there. Use one with write access to it."
    name, owner = account["name"], repo_id.split("/")[0]
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return (
            f"the token of account {name} may only read. Make one with write access at {api.endpoint}/settings/tokens, "
            "and set HF_TOKEN to it."
        )
    return (
        f"the token of account {name} may not write to repositories of {owner}. Push to {name}/NAME, have {owner} give "
        "that account write access, or give a fine-grained token the permission."
    )


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m serving.push", description=__doc__)
    parser.add_argument("repository", metavar="OWNER/NAME", help="is made where it does not exist")
    parser.add_argument("--private", action="store_true", help="only its owner and who they let in can see it")
    parser.add_argument("--revision-message", metavar="TEXT", default="Push the adapter", help="of the commit")
    return parser.parse_args()


def main() -> None:
    """Push the adapter and print where it is."""
    options = arguments()
    repo_id = options.repository
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot name a repository on the Hub: {error}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} must be OWNER/NAME, as my-account/{repo_id}")
    hash_in_lock = locked_hash(ADAPTER)
    files = adapter_files(ADAPTER, links_are_ours=hash_in_lock is not None)
    check_card(CARD, ADAPTER / "README.md")
    for warning in warnings_of(ADAPTER, hash_in_lock):
        print(f"warning: {warning}", file=sys.stderr)
    token = get_token()
    if token is None:
        raise UserError(
            f"there is no token to push to {repo_id} with. Set HF_TOKEN to one with write access, or log in with "
            "`.venv/bin/hf auth login`."
        )
    api = HfApi(token=token)
    details = f"{ADAPTER} in dvc.lock: {hash_in_lock}" if hash_in_lock else ""
    with clear_errors(api, repo_id):
        commit, is_new = push(
            api, repo_id, files | {"README.md": CARD}, options.private, options.revision_message, details
        )
    state = "pushed as" if is_new else "nothing to push: it already holds this adapter at"
    print(f"push: {api.endpoint}/{repo_id}: {state} commit {commit.oid}")


if __name__ == "__main__":
    run_stage(main)
