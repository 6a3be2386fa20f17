"""Starting jobs and endpoints: the real SDK, in an environment of its own, against an API on 127.0.0.1."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from serving.sagemaker.metrics import METRICS
from tests.aws_server import MISSING, AwsServer, serve_aws

ROOT = Path(__file__).resolve().parents[1]
# Not the user's own .venv-sagemaker. Made in seconds, since packages that fit are taken from this environment.
ENVIRONMENT = ROOT / ".venv-sagemaker-tests"
REQUIREMENTS = ROOT / "serving/sagemaker/requirements.txt"
ROLE = "arn:aws:iam::111122223333:role/pipeline"
IMAGE = "111122223333.dkr.ecr.eu-central-1.amazonaws.com/pipeline:1"
MACHINE = ("--image", IMAGE, "--role", ROLE, "--instance-type", "ml.g5.xlarge")
DELETE = ("delete", "--name", "tickets")
# Each as a command of its own, in a process that imports the SDK once.
DRIVER = """
import json, runpy, sys, contextlib, io
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("serving.sagemaker.launch", run_name="__main__")
    except SystemExit as end:
        code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Launch = Callable[..., list[Ended]]


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """A Python that has serving/sagemaker/requirements.txt."""
    python, mark = ENVIRONMENT / "bin/python", ENVIRONMENT / ".installed"
    if not mark.is_file() or mark.stat().st_mtime < REQUIREMENTS.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        [site] = ENVIRONMENT.glob("lib/python*/site-packages")
        [shared] = [path for path in sys.path if path.endswith("site-packages")][:1]
        (site / "shared.pth").write_text(shared + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS], check=True)
        mark.touch()
    return python


@pytest.fixture
def aws() -> Iterator[AwsServer]:
    with serve_aws() as server:
        yield server


@pytest.fixture
def launch(sdk_python: Path, aws: AwsServer, tmp_path: Path) -> Launch:
    """Run command lines, one after the other."""

    def launch(*commands: tuple[str, ...], **environment: str) -> list[Ended]:
        own = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "AWS_ENDPOINT_URL": aws.url,
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "COLUMNS": "120",
        }
        with subprocess.Popen(
            [sdk_python, "-c", DRIVER, json.dumps(commands)],
            cwd=ROOT, env=own | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            aws.client = process.pid
            out, err = process.communicate()
        assert process.returncode == 0 and "Traceback" not in err, err
        return [Ended(*json.loads(line)) for line in out.splitlines() if line.startswith("[")]

    return launch


def test_a_spot_job_is_asked_for_as_the_command_line_says_and_its_model_is_deployed_and_deleted(
    launch: Launch, aws: AwsServer
) -> None:
    inputs = (
        "train",
        *MACHINE,
        "--output",
        "s3://bucket/runs/",
        "--data",
        "s3://bucket/t/",
        "--recipe",
        "arxiv-topics",
    )
    job = (*inputs, "--spot", "--max-hours", "2", "--set", "finetune.max_steps=3", "--set", 'task.labels=["a=b"]')
    [started] = launch(job)
    assert started.code == 0, started.err
    [name] = aws.resources["TrainingJob"]
    assert re.fullmatch(r"pipeline-\d{8}-\d{6}", name)
    asked = aws.resources["TrainingJob"][name]
    assert asked["HyperParameters"] == {
        "finetune.max_steps": "3", "task.labels": '["a=b"]', "recipe": "arxiv-topics",
    }  # fmt: skip
    assert asked["EnableManagedSpotTraining"] is True
    assert asked["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert asked["CheckpointConfig"] == {"S3Uri": "s3://bucket/runs/checkpoints"}
    assert asked["OutputDataConfig"] == {"S3OutputPath": "s3://bucket/runs", "CompressionType": "NONE"}
    assert [
        (part["ChannelName"], part["DataSource"]["S3DataSource"]["S3Uri"]) for part in asked["InputDataConfig"]
    ] == [("data", "s3://bucket/t/")]
    defined = asked["AlgorithmSpecification"]["MetricDefinitions"]
    assert {metric["Name"]: metric["Regex"] for metric in defined} == METRICS
    assert "100 s of training, 30 s billed" in started.out and "test:f1_macro 0.8000" in started.out

    deploy = ("deploy", *MACHINE, "--job", name, "--name", "tickets", "--max-new-tokens", "64")
    deployed, deleted, again = launch(deploy, DELETE, DELETE)
    assert (deployed.code, deleted.code) == (0, 0), deployed.err + deleted.err
    created = {operation: request for operation, request in aws.requests if operation.startswith("Create")}
    container = created["CreateModel"]["PrimaryContainer"]
    assert container["Environment"] == {"MAX_NEW_TOKENS": "64"}
    assert container["ModelDataSource"]["S3DataSource"] == {
        "S3Uri": f"s3://bucket/runs/{name}/output/model/", "S3DataType": "S3Prefix", "CompressionType": "None",
    }  # fmt: skip
    assert created["CreateModel"]["EnableNetworkIsolation"] is True
    [variant] = created["CreateEndpointConfig"]["ProductionVariants"]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.g5.xlarge", 1)
    assert created["CreateEndpoint"]["EndpointName"] == "tickets"
    assert not any(aws.resources[kind] for kind in ("Endpoint", "EndpointConfig", "Model")), "nothing is left to pay"
    allowed = set(re.findall(r'"sagemaker:(\w+)"', (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8")))
    assert {operation for operation, _ in aws.requests} <= allowed, "the policy in docs/sagemaker.md lacks some"
    assert again.code == 1 and again.err == f"error: AWS refuses DescribeEndpoint: {MISSING} (ValidationException).\n"


def test_nothing_of_spot_is_asked_for_unasked_packed_models_are_taken_and_ctrl_c_says_that_the_job_goes_on(
    launch: Launch, aws: AwsServer
) -> None:
    launch(
        ("train", *MACHINE, "--output", "s3://bucket/runs", "--no-wait"),
        ("deploy", *MACHINE, "--model", "s3://bucket/m/model.tar.gz", "--name", "tickets", "--no-wait"),
    )
    operations = [operation for operation, _ in aws.requests]
    created = dict(aws.requests)
    assert created["CreateTrainingJob"]["EnableManagedSpotTraining"] is False
    assert created["CreateTrainingJob"]["StoppingCondition"] == {"MaxRuntimeInSeconds": 4 * 3600}
    assert "InputDataConfig" not in created["CreateTrainingJob"]
    assert created["CreateModel"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"] == {
        "S3Uri": "s3://bucket/m/model.tar.gz", "S3DataType": "S3Object", "CompressionType": "Gzip",
    }  # fmt: skip
    assert operations.count("DescribeEndpoint") == 1, "nobody waits"

    # The second question is the first of those that wait.
    aws.job_status, aws.interrupted_at = "InProgress", operations.count("DescribeTrainingJob") + 2
    [interrupted] = launch(("train", *MACHINE, "--output", "s3://bucket/runs"))
    _, job = sorted(aws.resources["TrainingJob"])
    assert interrupted.code == 130
    assert f"{job} goes on, and is paid for; to stop it: aws sagemaker stop-training-job --training-job-name {job}" in (
        interrupted.out
    )


def test_what_fails_is_said_in_one_message_and_leaves_nothing_behind(launch: Launch, aws: AwsServer) -> None:
    aws.job_status = "Failed"
    [failed] = launch(("train", *MACHINE, "--output", "s3://bucket/runs"))
    assert failed.code == 1 and "AlgorithmError: params.yaml is not usable" in failed.err
    [job] = aws.resources["TrainingJob"]
    aws.job_status = "Stopped"
    aws.refusals = {"CreateEndpoint": ("ResourceLimitExceeded", "The quota is 0 instances.")}
    none, refused = launch(
        ("deploy", *MACHINE, "--job", job, "--name", "tickets"),
        ("deploy", *MACHINE, "--model", "s3://bucket/m/", "--name", "tickets"),
    )
    assert none.code == 1 and f"error: --job: {job} is Stopped and has no model" in none.err
    assert refused.code == 1
    assert "error: AWS refuses CreateEndpoint: The quota is 0 instances. (ResourceLimitExceeded)." in refused.err
    assert [operation for operation, _ in aws.requests[-2:]] == ["DeleteEndpointConfig", "DeleteModel"]
    assert not aws.resources["Model"] and not aws.resources["EndpointConfig"]


def test_mistakes_of_the_command_line_are_named_before_aws_is_asked(launch: Launch, aws: AwsServer) -> None:
    wrong = ("train", *MACHINE, "--output", "bucket/runs", "--data", "tickets.csv", "--set", "x", "--max-hours", "0")
    refused, nothing, nowhere = launch((*wrong, "--max-wait-hours", "1"), (), DELETE, AWS_DEFAULT_REGION="")
    assert (refused.code, nothing.code, nowhere.code) == (1, 2, 1)
    for part in ("--output: 'bucket/runs' is no S3 URI", "--data: 'tickets.csv'", "--set: 'x' is", "--max-hours: 0"):
        assert part in refused.err
    assert "--max-wait-hours: means nothing without --spot" in refused.err
    assert "error: no AWS region is configured." in nowhere.err, "the SDK would take one of its own"
    [unknown] = launch(DELETE, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert unknown.code == 1 and "error: no AWS credentials are configured." in unknown.err
    assert aws.requests == []


def test_without_the_sdk_the_command_says_how_to_install_it() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "serving.sagemaker.launch", "delete", "--name", "x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert ".venv-sagemaker/bin/pip install --requirement serving/sagemaker/requirements.txt" in result.stderr
