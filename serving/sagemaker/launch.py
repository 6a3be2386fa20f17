"""Start a training job, make an endpoint of what it trained, delete the endpoint: `python -m serving.sagemaker.launch`.

Runs on a laptop, in an environment of its own (serving/sagemaker/requirements.txt). What costs money ends when a job
ends, and with `delete` for an endpoint.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from serving.sagemaker.folders import CHANNELS
from serving.sagemaker.metrics import METRICS
from serving.sagemaker.options import arguments, check
from stages.common.errors import UserError, run_stage

if TYPE_CHECKING:
    from sagemaker.core.resources import Endpoint, TrainingJob

# A multi-GB model is copied and loaded in it.
SECONDS_TO_START = 1800
# AWS allows 63 characters, and the time takes 16 of them.
MOST_NAME_CHARACTERS = 47


def stamped(name: str) -> str:
    """The name with the time behind it: AWS takes each once."""
    return f"{name[:MOST_NAME_CHARACTERS]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def job_request(options: argparse.Namespace) -> dict[str, Any]:
    """What a training job is to be, as `TrainingJob.create` takes it."""
    from sagemaker.core import shapes

    inputs = {name: getattr(options, name) for name in CHANNELS if getattr(options, name) is not None}
    hyperparameters = dict(item.split("=", 1) for item in options.set)
    if options.recipe is not None:
        hyperparameters["recipe"] = options.recipe
    seconds = int(options.max_hours * 3600)
    wait = int((options.max_wait_hours or 2 * options.max_hours) * 3600)
    output = options.output.rstrip("/")
    return {
        "training_job_name": stamped(options.name),
        "role_arn": options.role,
        "algorithm_specification": shapes.AlgorithmSpecification(
            training_image=options.image,
            training_input_mode="File",
            metric_definitions=[shapes.MetricDefinition(name=name, regex=regex) for name, regex in METRICS.items()],
        ),
        "hyper_parameters": hyperparameters,
        **({"input_data_config": [channel(name, uri) for name, uri in inputs.items()]} if inputs else {}),
        # Files as they are: packing gigabytes of weights would be paid for by the hour of a GPU.
        "output_data_config": shapes.OutputDataConfig(s3_output_path=output, compression_type="NONE"),
        "resource_config": shapes.ResourceConfig(
            instance_type=options.instance_type, instance_count=1, volume_size_in_gb=options.volume_gb
        ),
        "stopping_condition": shapes.StoppingCondition(
            max_runtime_in_seconds=seconds, **({"max_wait_time_in_seconds": wait} if options.spot else {})
        ),
        "enable_managed_spot_training": options.spot,
        # Fingerprints keep different runs apart, so that all jobs may share a place, and a second try goes on from it.
        "checkpoint_config": shapes.CheckpointConfig(s3_uri=options.checkpoints or f"{output}/checkpoints"),
    }


def channel(name: str, uri: str) -> Any:
    """A channel whose files are copied before the job starts."""
    from sagemaker.core import shapes

    source = shapes.S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
    return shapes.Channel(channel_name=name, data_source=shapes.DataSource(s3_data_source=source))


def train(options: argparse.Namespace) -> None:
    """Start a job, wait for it and say what became of it."""
    from sagemaker.core.resources import TrainingJob

    job = TrainingJob.create(**job_request(options))
    assert job is not None
    name = job.training_job_name
    print(f"train: {name} is started; its log is CloudWatch's /aws/sagemaker/TrainingJobs", flush=True)
    if options.no_wait:
        return
    try:
        job.wait(poll=10)
    except KeyboardInterrupt:
        stop = f"aws sagemaker stop-training-job --training-job-name {name}"
        print(f"train: {name} goes on, and is paid for; to stop it: {stop}", flush=True)
        raise
    _tell_end(job)


def _tell_end(job: TrainingJob) -> None:
    if job.training_job_status != "Completed":
        raise UserError(f"{job.training_job_name}: ended as {job.training_job_status}; its log says more.")
    seconds, billed = (getattr(job, f"{name}_time_in_seconds") for name in ("training", "billable"))
    print(f"train: {seconds} s of training, {billed} s billed; the model is in {model_uri(job)}")
    for metric in job.final_metric_data_list or []:
        print(f"train: {metric.metric_name} {metric.value:.4f}")


def model_uri(job: TrainingJob) -> str:
    """Where a job's model lies.

    Raises:
        UserError: it has none; AWS names a place in any case.
    """
    if job.training_job_status != "Completed":
        raise UserError(
            f"--job: {job.training_job_name} is {job.training_job_status} and has no model. Only Completed jobs "
            "have one; `train` with the same options goes on from this one's checkpoints."
        )
    return str(job.model_artifacts.s3_model_artifacts)


def model_source(uri: str) -> Any:
    """A model's files in S3: a folder, or one packed file."""
    from sagemaker.core import shapes

    packed = uri.endswith(".tar.gz")
    return shapes.ModelDataSource(
        s3_data_source=shapes.S3ModelDataSource(
            # Of a folder the API wants the slash.
            s3_uri=uri if packed else uri.rstrip("/") + "/",
            s3_data_type="S3Object" if packed else "S3Prefix",
            compression_type="Gzip" if packed else "None",
        )
    )


def deploy(options: argparse.Namespace) -> None:
    """Make model, configuration and endpoint, all of them or none, and wait until it answers."""
    from sagemaker.core import shapes
    from sagemaker.core.resources import Endpoint, EndpointConfig, Model, TrainingJob

    uri = options.model or model_uri(_found(TrainingJob.get(training_job_name=options.job)))
    name = stamped(options.name)
    limit = {} if options.max_new_tokens is None else {"MAX_NEW_TOKENS": str(options.max_new_tokens)}
    container = shapes.ContainerDefinition(image=options.image, model_data_source=model_source(uri), environment=limit)
    variant = shapes.ProductionVariant(
        variant_name="all",
        model_name=name,
        initial_instance_count=options.instances,
        instance_type=options.instance_type,
        model_data_download_timeout_in_seconds=SECONDS_TO_START,
        container_startup_health_check_timeout_in_seconds=SECONDS_TO_START,
    )
    with ExitStack() as made:
        # It needs nothing from elsewhere: the model's folder has the base.
        isolated = {"execution_role_arn": options.role, "enable_network_isolation": True}
        model = _found(Model.create(model_name=name, primary_container=container, **isolated))
        made.callback(model.delete)
        config = _found(EndpointConfig.create(endpoint_config_name=name, production_variants=[variant]))
        made.callback(config.delete)
        endpoint = _found(Endpoint.create(endpoint_name=options.name, endpoint_config_name=name))
        made.pop_all()
    print(f"deploy: {options.name} is being made; `delete --name {options.name}` ends it and its costs", flush=True)
    if not options.no_wait:
        _wait(endpoint)


def _wait(endpoint: Endpoint) -> None:
    endpoint.wait_for_status("InService", poll=10)
    print(f"deploy: {endpoint.endpoint_name} answers requests")


def delete(options: argparse.Namespace) -> None:
    """Delete an endpoint, its configuration and its models."""
    from sagemaker.core.resources import Endpoint, EndpointConfig, Model

    endpoint = _found(Endpoint.get(endpoint_name=options.name))
    config = _found(EndpointConfig.get(endpoint_config_name=str(endpoint.endpoint_config_name)))
    # The endpoint alone costs money: it goes first.
    endpoint.delete()
    config.delete()
    names = [str(variant.model_name) for variant in config.production_variants]
    for name in names:
        Model(model_name=name).delete()
    print(f"delete: {options.name}, its configuration and {', '.join(names)} are deleted; trained models stay in S3")


def _found(resource: Any) -> Any:
    assert resource is not None, "the SDK returns what it made or found, or raises"
    return resource


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what AWS and the SDK say into one message."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from sagemaker.core.utils.exceptions import FailedStatusError
    except ImportError:
        raise UserError(
            "the SageMaker SDK is not installed here. Make an environment for it:\n  python3 -m venv .venv-sagemaker\n"
            "  .venv-sagemaker/bin/pip install --requirement serving/sagemaker/requirements.txt\n"
            "and run .venv-sagemaker/bin/python -m serving.sagemaker.launch."
        ) from None
    if not boto3.Session().region_name:
        # The SDK would take one of its own.
        raise UserError("no AWS region is configured. Set AWS_DEFAULT_REGION, or run `aws configure`.")
    try:
        yield
    except NoCredentialsError:
        raise UserError("no AWS credentials are configured. Run `aws configure` or `aws sso login`.") from None
    except ClientError as error:
        found = error.response["Error"]
        raise UserError(f"AWS refuses {error.operation_name}: {found['Message']} ({found['Code']}).") from None
    except (BotoCoreError, FailedStatusError) as error:
        raise UserError(str(error)) from None


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"train": train, "deploy": deploy, "delete": delete}


def main() -> None:
    """Do what the command line says."""
    options = arguments(__doc__)
    check(options)
    with clear_errors():
        # It tells at length what it asks for.
        logging.getLogger("sagemaker").setLevel(logging.WARNING)
        COMMANDS[options.command](options)


if __name__ == "__main__":
    run_stage(main)
