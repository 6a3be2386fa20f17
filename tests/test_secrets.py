"""Marked secrets in the environment of real runs: nothing that is written or printed holds one."""

from __future__ import annotations

import base64
import urllib.parse
from pathlib import Path

from tests.forge_server import ACTIONS_TOKEN
from tests.hub_server import TOKEN

# Accepted by the servers of the tests where one is to accept it; a mark of its own elsewhere.
SECRETS = {
    "HF_TOKEN": TOKEN,
    "GITHUB_TOKEN": ACTIONS_TOKEN,
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDMARKED0001",
    "AWS_SECRET_ACCESS_KEY": "marked/aws+secret0002",
    "API_TOKEN": "marked-api-token-0003-long-enough",
    "APP_PASSWORD": "marked-app-password-0004",
    "PIP_INDEX_URL": "marked-index-password-0005",
    "HTTPS_PROXY": "marked-proxy-password-0006",
    "HF_ENDPOINT": "marked-endpoint-password-0007",
    "WANDB_API_KEY": "a" * 20 + "marked00080008000800",
}  # fmt: skip
IN_ADDRESSES = ("PIP_INDEX_URL", "HTTPS_PROXY", "HF_ENDPOINT")
# Port 9 (discard) of this machine answers nobody.
NOBODY = "127.0.0.1:9"


def planted(*left_out: str, **changes: str) -> dict[str, str]:
    """The environment that a careless user has."""
    values = {
        name: f"http://user:{secret}@{NOBODY}/" if name in IN_ADDRESSES else secret for name, secret in SECRETS.items()
    }
    return {name: value for name, value in (values | changes).items() if name not in left_out}


def spellings(secret: str) -> set[bytes]:
    """As it is, and as programs write it into addresses, headers and JSON."""
    found = {secret, urllib.parse.quote(secret, safe=""), base64.b64encode(secret.encode()).decode()}
    found |= {base64.b64encode(f"user:{secret}".encode()).decode()}
    return {one.encode() for one in found}


def leaks(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if any(one in content for one in spellings(secret))]


def require_none(*folders: Path) -> int:
    """Look into every file below the folders; how many there were."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {str(path): names for path in files if (names := leaks(path.read_bytes()))}
    assert not found
    return len(files)
