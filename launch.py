"""Train or evaluate: `python launch.py --config configs/final.py [--workdir DIR] [--mode train|eval] ...`."""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from resnet_jax.config import validate
from resnet_jax.errors import UserError, exit_on_user_error

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="File of the config, with :argument where it takes one; --config.field=value overrides."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config file's name> if not given.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or go on training), or evaluate a checkpoint.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Checkpoint to evaluate: best, latest or a step.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as SLURM, Open MPI, a TPU pod or Kubernetes (JobSet) started them."
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; whatever is wrong with it becomes one line."""
    with exit_on_user_error():
        app.define_help_flags()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # likewise
        try:
            rest = flags.FLAGS(argv)[1:]
        except SystemExit:
            raise  # --help
        except Exception as error:
            raise UserError(f"{error}") from error
        if rest:
            raise UserError(f"{' '.join(rest)}: stray argument; give --flag=value")
        if CONFIG.value is None:
            raise UserError("--config is missing: give a file of configs/, as in --config configs/final.py")
        validate(CONFIG.value)
    return argv


def main(_: list[str]) -> None:
    """Run what the flags say."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # --verbosity=0 shows what the libraries tell
    with exit_on_user_error():
        config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
        directory = Path(WORKDIR.value or Path("runs") / config_file.stem).expanduser().absolute()
        from resnet_jax import evaluate, train  # after the config is checked: importing JAX takes seconds

        if DISTRIBUTED.value:
            import jax

            jax.distributed.initialize()
        try:
            if MODE.value == "eval":
                evaluate.run(CONFIG.value, directory, CHECKPOINT.value)
            else:
                train.train(CONFIG.value, directory)
        except train.Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.signum)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
