"""Serve an adapter over HTTP: `python -m serving.api`, then `POST /classify` or `POST /v1/chat/completions`.

Logs are JSON lines on stderr, without the texts.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from serving.common.listening import listen
from serving.http.options import Settings, settings
from stages.common.errors import run_stage


def serve(options: Settings) -> None:
    """Serve until a signal ends it; what is under way is finished first.

    Raises:
        UserError: the adapter cannot be read or loaded, or the address cannot be had.
    """
    from serving.common.adapter import read_adapter

    adapter = read_adapter(options.adapter, options.decision)
    options.queue_rows(adapter.answers_with_texts)
    listener = listen(options.host, options.port)
    import uvicorn

    from serving.http.application import make_app
    from serving.http.logs import say, start_logging
    from serving.http.service import Service

    start_logging()

    def end() -> None:
        server.should_exit = True

    service = Service(options, adapter, on_failure=end)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(options.shutdown_seconds)),
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn ends in order, and then sends itself the signal again for whoever was there before.
        signal.signal(number, _nothing)
    host, port = listener.getsockname()[:2]
    say("listening", host=host, port=port, token=options.token is not None)
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    say("ended")
    if service.busy:
        # Loading or a last batch cannot be interrupted, and Python would wait for it.
        sys.stderr.flush()
        os._exit(0)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def main() -> None:
    """Serve what the command line names."""
    serve(settings(__doc__))


if __name__ == "__main__":
    run_stage(main)
