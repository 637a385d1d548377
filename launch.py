"""Train or evaluate: `python launch.py --config configs/final.py [--workdir DIR] [--mode train|eval] ...`."""

import os
import re
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from resnet_jax.config import validate
from resnet_jax.errors import UserError, exit_on_user_error

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="File of the config, with :argument where it takes one; --config.field=value overrides."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config file's name>[-variant] if not given.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or go on training), or evaluate a checkpoint.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Checkpoint to evaluate: best, latest or a step.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as SLURM, Open MPI, a TPU pod or Kubernetes (JobSet) started them."
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line and check the config; whatever is wrong becomes one line."""
    with exit_on_user_error():
        app.define_help_flags()
        flags.FLAGS.verbosity = logging.ERROR  # --verbosity=0 shows what the libraries tell
        os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ  # quiet TensorFlow too
        try:
            rest = flags.FLAGS(argv)[1:]
            config = CONFIG.value
        except Exception as error:
            raise UserError(_reason(error)) from error
        if rest:
            raise UserError(f"{' '.join(rest)}: stray argument; give --flag=value")
        if not flags.FLAGS["config"].present:
            raise UserError("--config is missing: give a file of configs/, as in --config configs/final.py")
        file, _ = _config_file()
        if not file.is_file():
            raise UserError(f"--config {file} is not a file: give a file of configs/")
        if not isinstance(config, ConfigDict):
            raise UserError(f"{file}: get_config() returned {config!r}: it must return a ConfigDict")
        validate(config)
    return argv


def _config_file() -> tuple[Path, str]:
    """The config file and its variant, the part after a colon."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return Path(file), variant


def _reason(error: Exception) -> str:
    """What went wrong while the flags were parsed and the config file was run, and where in that file."""
    reason = (str(error).strip().splitlines() or [""])[-1]
    if not isinstance(error, flags.Error):
        kind = "no such field" if isinstance(error, (AttributeError, KeyError)) else type(error).__name__
        quoted = r"\\n|\\'|'|\""  # ml_collections' messages come as the repr of a repr
        reason = f"--config: {kind}: {re.sub(quoted, ' ', reason)}"
    ours = [
        f for f in traceback.extract_tb(error.__traceback__)[1:] if not re.search(r"site-packages|<frozen", f.filename)
    ]
    return reason + (f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else "")


def _join_cluster() -> None:
    import jax

    try:
        jax.distributed.initialize()  # finds its peers in the cluster's environment
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster's environment here ({error}): start the processes with srun, mpirun or a JobSet"
        ) from error


def main(_: list[str]) -> None:
    """Run what the flags say."""
    with exit_on_user_error():
        file, variant = _config_file()
        default = Path("runs") / "-".join(filter(None, [file.stem, variant]))
        directory = Path(os.path.expanduser(WORKDIR.value or default)).absolute()
        from resnet_jax import evaluate, train  # after the config is checked: importing JAX takes seconds

        if DISTRIBUTED.value:
            _join_cluster()
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
