"""Marked secrets for the environment of real runs, and the search for them in all that was written."""

from __future__ import annotations

import base64
import urllib.parse
from pathlib import Path

from tests.forge_server import ACTIONS_TOKEN
from tests.hub_server import TOKEN

# Accepted by the servers of the tests where one is to accept it; marks of their own elsewhere.
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
    "WANDB_API_KEY": "marked" + "0008" * 8,
}
IN_ADDRESSES = ("PIP_INDEX_URL", "HTTPS_PROXY", "HF_ENDPOINT")
# Port 9 (discard) of this machine answers nobody.
NOBODY = "127.0.0.1:9"


def planted(*left_out: str, **changes: str) -> dict[str, str]:
    """All of them as a user's environment has them, but for some."""
    values = {
        name: f"http://user:{secret}@{NOBODY}" if name in IN_ADDRESSES else secret for name, secret in SECRETS.items()
    }
    return {name: value for name, value in (values | changes).items() if name not in left_out}


def leaks(content: bytes) -> list[str]:
    """The names of the secrets in it: as they are, or as addresses and headers spell them."""
    found = []
    for name, secret in SECRETS.items():
        pairs = base64.b64encode(f"user:{secret}".encode()), base64.b64encode(secret.encode())
        if any(one in content for one in (secret.encode(), urllib.parse.quote(secret, safe="").encode(), *pairs)):
            found.append(name)
    return found


def require_none_below(*folders: Path) -> int:
    """Look into every file below the folders; how many there were."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {str(path): names for path in files if (names := leaks(path.read_bytes()))}
    assert not found, found
    return len(files)
