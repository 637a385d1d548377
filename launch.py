"""Train or evaluate: `python launch.py --config configs/final.py [--workdir DIR] [--mode train|eval] ...`."""

import math
import os
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from resnet_jax import cli
from resnet_jax.errors import UserError
from resnet_jax.runs.profiling import Profile

STARTED = time.monotonic()

flags.declare_key_flag("config")  # so that --help shows it
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config file's name>[-variant] if not given.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or go on training), or evaluate a checkpoint.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Checkpoint to evaluate: best, latest or a step.")
FLIP = flags.DEFINE_bool("flip", False, "Evaluate the average of each image's and its mirror's logits.")
FIT_TEMPERATURE = flags.DEFINE_bool(
    "fit-temperature", False, "Evaluate with, and keep, the temperature that calibrates the validation split."
)
MAX_SECONDS = flags.DEFINE_float(
    "max-seconds", None, "Stop training after this many seconds, saved and with exit code 124.", lower_bound=0.0
)
flags.register_validator("max-seconds", lambda v: v is None or math.isfinite(v), "it must be a number of seconds")
PROFILE = flags.DEFINE_string(
    "profile", None, "START:COUNT: trace so many steps into WORKDIR/profile and print the ten costliest operations."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as SLURM, Open MPI, a TPU pod or Kubernetes (JobSet) started them."
)


def main(config: ConfigDict) -> None:
    """Run what the flags say."""
    file, variant = cli.config_file()
    default = Path("runs") / "-".join(filter(None, [file.stem, variant]))
    if WORKDIR.value is not None and (not WORKDIR.value.isprintable() or "://" in WORKDIR.value or not WORKDIR.value):
        raise UserError(
            f"--workdir {WORKDIR.value!r} is not the path of a folder: mount a bucket, or leave the flag out"
        )
    directory = Path(os.path.expanduser(WORKDIR.value or default)).absolute()
    profile = None if PROFILE.value is None else Profile(PROFILE.value)
    if profile and MODE.value == "eval":
        raise UserError("--profile traces steps of training: leave it out, or --mode eval")
    if (FLIP.value or FIT_TEMPERATURE.value) and MODE.value == "train":
        raise UserError("--flip and --fit-temperature are of evaluation: leave them out, or give --mode eval")
    try:  # only now that the config is checked, for importing JAX takes seconds
        from resnet_jax import training
        from resnet_jax.runs import preemption, processes
    except (ImportError, ValueError) as error:
        raise UserError(f"JAX does not start ({error}): mend the environment, or install resnet_jax again") from error

    if DISTRIBUTED.value:
        processes.join()
    try:
        with processes.abort_all_on_error():
            if MODE.value == "eval":
                from resnet_jax.reporting import evaluation  # only here, for Matplotlib takes a second

                evaluation.run(config, directory, CHECKPOINT.value, FLIP.value, FIT_TEMPERATURE.value)
            else:
                training.train(config, directory, STARTED, MAX_SECONDS.value, profile)
    except preemption.TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    cli.run(main)
