"""Answer texts with an adapter in a web page on this machine: `python -m serving.app`.

Classification adapters get a page for texts and CSV files, chat and question answering adapters a chat.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from stages.common.errors import UserError, listing, run_stage

PORT = 7860
PACKAGES = ("gradio", "fastapi", "uvicorn")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.app", description=__doc__, epilog="APP_PASSWORD in the environment asks for a login.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter (default models/adapter)")
    parser.add_argument(
        "--decision", metavar="FILE", help="its thresholds (default: models/decision.json, for models/adapter alone)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: only this machine's)")
    parser.add_argument("--port", type=int, default=PORT, help=f"the port (default {PORT}; 0: any that is free)")
    return parser.parse_args()


def require_packages() -> None:
    """Refuse to start without what serving needs.

    Raises:
        UserError: says which is absent.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"{sys.prefix} lacks {listing(absent)}. `make serving` installs what this command needs.")


def main() -> None:
    """Serve the page until somebody ends it."""
    options = arguments()
    require_packages()
    from serving.common.adapter import ADAPTER, read_adapter
    from serving.common.notes import answer_limit
    from serving.web.server import listen, make_app, private_folder, serve

    adapter = read_adapter(Path(options.adapter or ADAPTER), options.decision and Path(options.decision))
    # What the page's slider starts with.
    limit = answer_limit(None, adapter)
    password = os.environ.get("APP_PASSWORD") or None
    with listen(options.host, options.port) as listener, private_folder() as folder:
        from serving.web.loading import load_for_page

        app = make_app(load_for_page(adapter, limit), folder, password)
        host, port = listener.getsockname()[:2]
        print(f"app: http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        serve(app, listener)
    print("app: ended", flush=True)


if __name__ == "__main__":
    run_stage(main)
