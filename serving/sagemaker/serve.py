"""A trained model as a SageMaker endpoint or batch transform: `python -m serving.sagemaker serve`.

GET /ping says that the model is loaded, POST /invocations answers.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI, Request, Response

from serving.sagemaker.bodies import JSON, MOST_BYTES, Refused, answer_form, form_of, read_request, write_answers
from serving.sagemaker.folders import folders
from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.predictor import Predictor

# After which SageMaker gives up.
SECONDS_TO_ANSWER = 60
# Requests in the container, the one being answered included; more are refused at once.
MOST_REQUESTS = 64
# It kills the container 30 seconds after SIGTERM.
SECONDS_TO_STOP = 25


def load(model: Path) -> Predictor:
    """The predictor of what a training job left, in a folder of its own: SageMaker's is read-only.

    Raises:
        UserError: the adapter or its base cannot be used; or see `answer_limit`.
    """
    from serving.predictor import load_predictor

    limit = answer_limit(model / "params.yaml")
    if not (model / "adapter").is_dir():
        raise UserError(f"{model}: holds no folder adapter/. Deploy what a training job of this image left.")
    models = Path(tempfile.mkdtemp(prefix="serving-")) / "models"
    models.mkdir()
    for path in model.iterdir():
        (models / path.name).symlink_to(path.resolve())
    os.chdir(models.parent)
    return load_predictor(max_new_tokens=limit)


def answer_limit(params: Path) -> int:
    """The longest answer in tokens: MAX_NEW_TOKENS of the environment, else as the job's own predictions were made.

    Args:
        params: the job's params.yaml; may be absent.

    Raises:
        UserError: it is not usable, or MAX_NEW_TOKENS is no number of tokens.
    """
    from serving.predictor import MAX_NEW_TOKENS
    from stages.common.params import load_params

    asked = os.environ.get("MAX_NEW_TOKENS")
    if asked is None:
        limit = load_params("infer", path=params).infer.max_new_tokens if params.is_file() else None
        return limit or MAX_NEW_TOKENS
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"MAX_NEW_TOKENS={asked} in the environment has to be 1 or more.")
    return int(asked)


async def read_body(request: Request) -> bytes:
    """The request's body.

    Raises:
        Refused: it is larger than MOST_BYTES, whatever its Content-Length says.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body is larger than {MOST_BYTES:,} bytes. Send fewer rows at once.")
    return bytes(body)


def application(predictor: Predictor) -> FastAPI:
    """The two routes."""
    app = FastAPI(title="SageMaker endpoint", docs_url=None, redoc_url=None, openapi_url=None)
    turn = asyncio.Lock()
    present = 0

    @app.get("/ping")
    async def ping() -> Response:
        return Response()

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        nonlocal present
        arrived = time.monotonic()
        if present >= MOST_REQUESTS:
            return _refusal(Refused(429, f"{present} requests are waiting. Try again, or add instances."))
        present += 1
        try:
            return await _answer(request, arrived)
        except Refused as refused:
            return _refusal(refused)
        except UserError as error:
            print(f"error: {error}", flush=True)
            return _refusal(Refused(500, str(error)))
        finally:
            present -= 1

    async def _answer(request: Request, arrived: float) -> Response:
        form = form_of(request.headers.get("content-type", ""))
        wanted = answer_form(request.headers.get("accept", "*/*"), form)
        # In a thread: a large body takes a second, and /ping has two.
        contents, single = await asyncio.to_thread(read_request, await read_body(request), form, predictor.adapter)
        async with turn:
            # Nobody waits any longer for what came too long ago.
            if time.monotonic() - arrived > SECONDS_TO_ANSWER:
                raise Refused(503, f"the request waited for {SECONDS_TO_ANSWER} s. Send fewer, or add instances.")
            answers = await asyncio.to_thread(predictor.predict, contents)
        print(f"serve: {len(answers):,} rows, {time.monotonic() - arrived:.3f} s", flush=True)
        return Response(write_answers(answers, wanted, single), media_type=wanted)

    return app


def _refusal(refused: Refused) -> Response:
    return Response(write_answers([{"error": str(refused)}], JSON, True), refused.status, media_type=JSON)


def main() -> None:
    """Load the model, then listen; an endpoint that cannot load it ends with one message in its log."""
    predictor = load(folders().model)
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))
    print(f"serve: {predictor.adapter.kind} on {predictor.model.device}, port {port}", flush=True)
    uvicorn.run(
        application(predictor), host="0.0.0.0", port=port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=SECONDS_TO_STOP,
    )  # fmt: skip
