"""SageMaker's API on 127.0.0.1, as far as launching needs it: real HTTP requests of the real SDK, recorded."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ARN = "arn:aws:sagemaker:eu-central-1:111122223333"
MISSING = "Could not find it."


class AwsServer:
    """What was asked for, and what is there.

    Attributes:
        requests: the name of each operation and what was sent, in order.
        resources: by kind ("TrainingJob", "Model", "EndpointConfig", "Endpoint") and name, as they were created.
        refusals: operations that are to fail, and with which code and message.
        job_status: what training jobs are, or ended as.
        client: the id of the process that asks.
        interrupted_at: the how-manieth question about a training job gets Ctrl-C into that process as well; 0: none.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.resources: dict[str, dict[str, dict[str, Any]]] = {}
        self.refusals: dict[str, tuple[str, str]] = {}
        self.job_status = "Completed"
        self.client = 0
        self.interrupted_at = 0
        self.url = ""

    def answer(self, operation: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the response."""
        self.requests.append((operation, request))
        if operation in self.refusals:
            code, message = self.refusals[operation]
            return 400, {"__type": code, "message": message}
        if [name for name, _ in self.requests].count("DescribeTrainingJob") == self.interrupted_at > 0:
            os.kill(self.client, signal.SIGINT)
        verb = next(verb for verb in ("Create", "Describe", "Delete") if operation.startswith(verb))
        kind = operation.removeprefix(verb)
        there, name = self.resources.setdefault(kind, {}), request[f"{kind}Name"]
        if verb == "Create":
            there[name] = request
            return 200, {f"{kind}Arn": f"{ARN}:{kind.lower()}/{name}"}
        if name not in there:
            return 400, {"__type": "ValidationException", "message": MISSING}
        if verb == "Delete":
            del there[name]
            return 200, {}
        return 200, there[name] | {f"{kind}Arn": f"{ARN}:{kind.lower()}/{name}", "CreationTime": 0} | self._state(
            kind, name
        )

    def _state(self, kind: str, name: str) -> dict[str, Any]:
        if kind == "TrainingJob":
            output = self.resources[kind][name]["OutputDataConfig"]["S3OutputPath"]
            return {
                "TrainingJobStatus": self.job_status,
                "SecondaryStatus": self.job_status,
                "FailureReason": "AlgorithmError: params.yaml is not usable",
                "TrainingTimeInSeconds": 100,
                "BillableTimeInSeconds": 30,
                "FinalMetricDataList": [{"MetricName": "test:f1_macro", "Value": 0.8, "Timestamp": 0}],
                # AWS names the place from the start, whether or not a model ever gets there.
                "ModelArtifacts": {"S3ModelArtifacts": f"{output}/{name}/output/model"},
            }
        return {"EndpointStatus": "InService", "LastModifiedTime": 0} if kind == "Endpoint" else {}


@contextmanager
def serve_aws() -> Iterator[AwsServer]:
    """A running server."""
    aws = AwsServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Authorization"].startswith("AWS4-HMAC-SHA256")
            status, answer = aws.answer(self.headers["X-Amz-Target"].removeprefix("SageMaker."), json.loads(body))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        aws.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield aws
        finally:
            server.shutdown()
            thread.join()
