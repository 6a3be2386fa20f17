"""Answer texts with an adapter in a web page on this machine: `python -m serving.app`.

Classification adapters get a page for texts and CSV files, chat and question answering adapters a chat.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from serving.common.adapter import ADAPTER, read_adapter
from serving.common.listening import is_loopback, listen
from serving.common.notes import answer_limit, notes
from serving.common.options import refuse_decision, refuse_empty
from serving.common.packages import require_packages
from stages.common.errors import UserError, run_stage

PORT = 7860
PASSWORD_VARIABLE = "APP_PASSWORD"
PACKAGES = ("gradio", "fastapi", "uvicorn")


def arguments() -> argparse.Namespace:
    """What the command line says.

    Raises:
        UserError: an option is empty.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"With {PASSWORD_VARIABLE} in the environment the page asks for that password.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter (default models/adapter)")
    parser.add_argument(
        "--decision", metavar="FILE", help="its thresholds (default: models/decision.json, for models/adapter alone)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: only this machine's)")
    parser.add_argument("--allow-anonymous", action="store_true", help="listen on other addresses without a login")
    parser.add_argument("--port", type=int, default=PORT, help=f"the port (default {PORT}; 0: any that is free)")
    options = parser.parse_args()
    refuse_empty(options, ("adapter", "decision", "host"))
    return options


def read_password(options: argparse.Namespace) -> str | None:
    """What a login asks for; None: there is no login.

    Raises:
        UserError: it is empty, or there is none where other machines reach the app.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    if password == "":
        raise UserError(f"{PASSWORD_VARIABLE} in the environment: is empty. Give a password, or unset it.")
    if password is None and not options.allow_anonymous and not is_loopback(options.host):
        raise UserError(
            f"--host: at {options.host} other machines reach the app, and anybody could use it. Set "
            f"{PASSWORD_VARIABLE} in the environment, or say --allow-anonymous."
        )
    return password


def main() -> None:
    """Serve the page until somebody ends it."""
    options = arguments()
    require_packages(*PACKAGES)
    password = read_password(options)
    from serving.web.server import make_app, private_folder, serve

    adapter = read_adapter(Path(options.adapter or ADAPTER), options.decision and Path(options.decision))
    refuse_decision(options, adapter)
    # What the page's slider starts with.
    limit = answer_limit(None, adapter)
    with listen(options.host, options.port) as listener, private_folder() as folder:
        # A page of answers that are texts shows their longest itself.
        for note in () if adapter.answers_with_texts else notes(adapter, limit):
            print(f"app: {note}", file=sys.stderr, flush=True)
        from serving.web.loading import load_for_page

        app = make_app(load_for_page(adapter, limit), folder, password)
        host, port = listener.getsockname()[:2]
        print(f"app: http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        serve(app, listener)
    print("app: ended", flush=True)


if __name__ == "__main__":
    run_stage(main)
