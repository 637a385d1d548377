"""The tools `train` and `eval`; `launch.py` uses their parts too."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.errors import UserError
from resnet_jax.runs.profiling import Profile
from resnet_jax.runs.stored_config import CHANGEABLE_FIELDS

_TRAIN = """Train a run, or resume it.

    python -m resnet_jax train --config final                            # trains in runs/final
    python -m resnet_jax train --config my.py --workdir runs/x --config.optim.learning_rate=0.003

Rerun the command to resume a run that was stopped. Ctrl-C finishes the step, saves and exits.
"""
_EVAL = """Evaluate a checkpoint of a run on its validation and test splits.

    python -m resnet_jax eval runs/final [--checkpoint latest] [--config.data.data_dir=DIR]
    python -m resnet_jax eval runs/final --data folder:DIR              # on other images of the same classes

The config is that of the run. Override a field only if the result does not depend on it.
"""


def add_train_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `train`."""
    command_line.add_config_arguments(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder of the run (default: runs/NAME[-variant] for the config NAME, or the folder of a run's config.json)",
    )
    parser.add_argument(
        "--max-seconds",
        type=command_line.seconds,
        metavar="S",
        help="stop training after this time, save, and exit with code 124",
    )
    parser.add_argument(
        "--extend-to",
        type=float,
        metavar="EPOCHS",
        help="train the run of the workdir for more epochs, EPOCHS in all; the schedule begins anew, without warm-up",
    )
    parser.add_argument(
        "--profile",
        type=Profile,
        metavar="START:COUNT",
        help="trace COUNT steps from step START into DIR/profile and print the ten slowest operations",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes, started by SLURM, Open MPI, a TPU pod or Kubernetes (JobSet)",
    )


def add_eval_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `eval`."""
    parser.add_argument("--checkpoint", metavar="WHICH", help="best, latest or a step (default: best)")
    command_line.add_views_argument(parser)
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="fit the temperature that calibrates the validation split, and keep it for predictions",
    )


def train(argv: Sequence[str]) -> None:
    """The tool `train`."""
    started = time.monotonic()
    parser = ArgumentParser("python -m resnet_jax train", _TRAIN)
    add_train_arguments(parser)
    arguments, config = command_line.parse_config(parser, argv)
    start_training(arguments, config, started)


def evaluate(argv: Sequence[str]) -> None:
    """The tool `eval`."""
    parser = ArgumentParser("python -m resnet_jax eval", _EVAL)
    parser.add_argument("run", metavar="RUN", help="workdir of a run")
    add_eval_arguments(parser)
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="evaluate on this labelled set with the run's classes, such as folder:DIR, and write a file of its own",
    )
    command_line.add_override_argument(parser)
    rest, overrides = command_line.split_overrides(argv)
    arguments = parser.parse_args(rest)
    directory = command_line.folder(arguments.run, "RUN")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no run: give the workdir of a run")
    config = command_line.load_config(directory / "config.json", overrides)
    for override in overrides:
        flag = override.partition("=")[0]
        if flag.removeprefix("--config.") not in CHANGEABLE_FIELDS:
            raise UserError(f"{flag} changes the result: leave it out, or train a run with it")
    if not arguments.data:
        start_evaluation(arguments, config, directory)
        return
    if arguments.fit_temperature:
        raise UserError("--fit-temperature uses the run's validation split: leave out --data")
    with _session(distributed=False):
        from resnet_jax.reporting import evaluation

        evaluation.run_on(config, directory, arguments.checkpoint or "best", arguments.data, arguments.views)


def workdir(arguments: Namespace) -> Path:
    """The folder of the run that the flags of `train` name."""
    if arguments.workdir is None:
        return command_line.default_workdir(arguments.config).absolute()
    return command_line.folder(arguments.workdir)


def start_training(arguments: Namespace, config: ConfigDict, started: float) -> None:
    """Train as the flags of `train` say; `started` is the `time.monotonic()` at which the command began."""
    directory = workdir(arguments)
    with _session(arguments.distributed):
        from resnet_jax.inference.fine_tuning import initialise
        from resnet_jax.runs.preemption import StopRequest
        from resnet_jax.runs.workdir import extended
        from resnet_jax.training import train

        if arguments.extend_to is not None:
            config = extended(directory, config, arguments.extend_to)
        hooks = [arguments.profile] if arguments.profile else []
        stop_request = StopRequest(arguments.max_seconds, started)
        train(config, directory, started, hooks, stop_request=stop_request, initialise=initialise)


def start_evaluation(arguments: Namespace, config: ConfigDict, directory: Path, distributed: bool = False) -> None:
    """Evaluate the run of a folder as the flags of `eval` say."""
    with _session(distributed):
        from resnet_jax.reporting import evaluation

        evaluation.run(config, directory, arguments.checkpoint or "best", arguments.views, arguments.fit_temperature)


@contextmanager
def _session(distributed: bool) -> Iterator[None]:
    """Import JAX, which takes seconds, find the other processes, and exit with the code of a session that is stopped."""
    try:
        from resnet_jax.runs import preemption, processes
    except (ImportError, ValueError) as error:
        raise UserError(f"JAX does not start ({error}): fix the environment, or reinstall resnet_jax") from error
    if distributed:
        processes.join()
    try:
        with processes.abort_all_on_error():
            yield
    except preemption.TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
