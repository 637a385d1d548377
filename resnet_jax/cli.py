"""The command line that every tool with a config shares: `--config FILE[:variant] [--config.field=value ...]`."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from resnet_jax.config import ALL_FIELDS, Field, check_name, validate
from resnet_jax.errors import (
    UserError,
    exit_immediately,
    exit_on_user_error,
    hide_closed_loops,
    is_out_of_memory,
    report,
)

with exit_on_user_error():
    try:
        CONFIG = config_flags.DEFINE_config_file(
            "config", help_string="File of the config, with :variant where it has one; --config.field=value overrides."
        )
    except flags.Error as error:  # a --flagfile that is not there: ml_collections reads the command line already here
        raise UserError(str(error)) from error


def run(main: Callable[[ConfigDict], None], extra_fields: Mapping[str, Field] = MappingProxyType({})) -> None:
    """Parse the command line, check the config and run a tool on it; a `UserError` is one line and exit code 2.

    Args:
        main: the tool.
        extra_fields: that its configs have besides a run's.
    """

    def guarded(_: list[str]) -> None:
        try:
            main(CONFIG.value)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # outside the training loop there is nothing to save
        except UserError as error:
            report(error)
            exit_immediately(2)
        except OSError as error:  # the machine's: a full disk under the standard output, say
            report(f"{error}: mend that, and start the same command again")
            exit_immediately(2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            report(
                f"out of memory ({str(error)[:200]}): lower config.batch_size or config.eval_batch_size, or make the model "
                "smaller"
            )
            exit_immediately(2)

    sys.unraisablehook = hide_closed_loops
    app.run(guarded, flags_parser=partial(_parse_flags, extra_fields=extra_fields))


def config_file() -> tuple[Path, str]:
    """The config file and its variant, the part after a colon."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return Path(file), variant


def _parse_flags(argv: list[str], extra_fields: Mapping[str, Field] = MappingProxyType({})) -> list[str]:
    """Parse the command line and check the config; whatever is wrong becomes one line."""
    with exit_on_user_error():
        app.define_help_flags()
        setattr(flags.FLAGS, "verbosity", logging.FATAL)  # noqa: B010  --verbosity=0 shows what the libraries tell
        os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ  # quiet TensorFlow too
        for argument in argv[1:]:
            if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
                check_name(override[1], ALL_FIELDS | dict(extra_fields))
        given = sum(re.match("--?config(=|$)", argument) is not None for argument in argv[1:])
        if given > 1:
            raise UserError(f"--config is given {given} times: give it once")
        try:
            rest = flags.FLAGS(argv)[1:]
            config = CONFIG.value
        except SystemExit:
            sys.exit(0)  # --help has been printed
        except Exception as error:
            raise UserError(_reason(error)) from error
        if rest:
            raise UserError(f"{' '.join(rest)}: stray argument; give --flag=value")
        if not flags.FLAGS["config"].present:
            raise UserError("--config is missing: give a file of configs/, as in --config configs/final.py")
        file, _ = config_file()
        if not file.is_file():
            raise UserError(f"--config {file} is not a file: give a file of configs/")
        if not isinstance(config, ConfigDict):
            raise UserError(f"{file}: get_config() returned {config!r}: it must return a ConfigDict")
        validate(config, extra_fields)
    return argv


def _reason(error: Exception) -> str:
    """What went wrong while the flags were parsed and the config file was run, and where in that file."""
    reason = str(error).strip()
    if "Traceback" in reason:
        reason = reason.splitlines()[-1]
    if not isinstance(error, flags.Error):
        kind = "no such field" if isinstance(error, (AttributeError, KeyError)) else type(error).__name__
        quoted = r"\\n|\\'|'|\""  # ml_collections' messages come as the repr of a repr
        reason = f"--config: {kind}: {re.sub(quoted, ' ', reason)}"
    ours = [
        f for f in traceback.extract_tb(error.__traceback__)[1:] if not re.search(r"site-packages|<frozen", f.filename)
    ]
    return reason + (f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else "")
