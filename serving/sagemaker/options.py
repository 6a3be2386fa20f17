"""The command line of `python -m serving.sagemaker.launch`, and what of it cannot be meant."""

from __future__ import annotations

import argparse

from serving.sagemaker.folders import CHANNELS
from stages.common.errors import UserError

EXAMPLES = """
examples:
  python -m serving.sagemaker.launch train --image IMAGE --role ROLE --instance-type ml.g5.xlarge --spot \\
      --output s3://BUCKET/runs --data s3://BUCKET/tickets/ --params s3://BUCKET/params/ --set finetune.max_steps=300
  python -m serving.sagemaker.launch deploy --image IMAGE --role ROLE --instance-type ml.g5.xlarge \\
      --job JOB --name tickets
  python -m serving.sagemaker.launch delete --name tickets

Account, region and credentials are those of the AWS command line. docs/sagemaker.md has permissions and costs.
"""


def arguments(description: str | None) -> argparse.Namespace:
    """What the command line says.

    Args:
        description: what the command does, for its help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving.sagemaker.launch",
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="start a training job", allow_abbrev=False))
    _add_deploy(commands.add_parser("deploy", help="make an endpoint of what a job trained", allow_abbrev=False))
    delete = commands.add_parser("delete", help="delete an endpoint, and end its costs", allow_abbrev=False)
    delete.add_argument("--name", required=True, help="the endpoint's")
    return parser.parse_args()


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="of docs/container.md's target sagemaker, in ECR")
    parser.add_argument("--role", required=True, metavar="ARN", help="what the container may do")
    parser.add_argument("--instance-type", required=True, metavar="TYPE", help="ml.…; it decides what an hour costs")
    parser.add_argument("--no-wait", action="store_true", help="return when AWS has accepted it")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_machine(parser)
    parser.add_argument("--output", required=True, metavar="S3", help="model, results and checkpoints go below it")
    parser.add_argument("--name", default="pipeline", help="the job's name begins with it (default pipeline)")
    for name, meaning in CHANNELS.items():
        parser.add_argument(f"--{name}", metavar="S3", help=meaning)
    parser.add_argument("--recipe", help="a name in recipes/, in place of params.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of params.yaml; may be repeated"
    )
    parser.add_argument("--spot", action="store_true", help="spare capacity, cheaper, interrupted at any time")
    parser.add_argument(
        "--checkpoints", metavar="S3", help="default: OUTPUT/checkpoints; shared, a job goes on from it"
    )
    parser.add_argument("--max-hours", type=float, default=4, metavar="H", help="of training, at most (default 4)")
    parser.add_argument(
        "--max-wait-hours", type=float, metavar="H", help="with --spot: training and waiting, at most (default twice)"
    )
    parser.add_argument("--volume-gb", type=int, default=50, metavar="N", help="disk (default 50)")


def _add_deploy(parser: argparse.ArgumentParser) -> None:
    _add_machine(parser)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--job", help="a finished training job")
    model.add_argument("--model", metavar="S3", help="its model folder, or a model.tar.gz of that")
    parser.add_argument("--name", required=True, help="of the endpoint")
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer, in tokens (default: the job's)"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse what AWS would refuse later, or what would be something else than meant; all at once.

    Raises:
        UserError: names the options.
    """
    problems = []
    for name in ("output", "checkpoints", "model", *CHANNELS):
        uri = getattr(options, name, None)
        if uri is not None and not uri.startswith("s3://"):
            problems.append(f"--{name}: {uri!r} is no S3 URI. `aws s3 cp --recursive` copies files there.")
    for name in ("max_hours", "max_wait_hours", "volume_gb", "instances", "max_new_tokens"):
        number = getattr(options, name, None)
        if number is not None and number <= 0:
            problems.append(f"--{name.replace('_', '-')}: {number:g} has to be more than 0.")
    if options.command == "train":
        problems += [f"--set: {item!r} is not KEY=VALUE" for item in options.set if "=" not in item]
        if options.max_wait_hours is not None and not options.spot:
            problems.append("--max-wait-hours: means nothing without --spot. Leave it out.")
        elif options.max_wait_hours is not None and options.max_wait_hours < options.max_hours:
            problems.append(f"--max-wait-hours: has to be --max-hours ({options.max_hours:g}) or more.")
        if options.recipe is not None and options.params is not None:
            problems.append("--recipe: --params has a whole params.yaml. Give one of them.")
    if problems:
        raise UserError("\n  ".join(["the command line cannot be used:", *problems]))
