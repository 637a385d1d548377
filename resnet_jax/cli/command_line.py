"""The command line that all tools share: whole flags, `--config` with its overrides, and one line for a mistake."""

import argparse
import difflib
import importlib.machinery
import importlib.util
import io
import math
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from resnet_jax import config as config_lib
from resnet_jax import host
from resnet_jax.config import Field
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config
from resnet_jax.runs.exits import exit_immediately, exit_on_user_error, hide_closed_loops

_ADDRESS_SPACE = 4 * 10**9  # bytes; a run of final.py:smoke ends well with 4.1e9, and crashes or hangs with 1.8e9
Tool = Callable[[Sequence[str]], None]  # runs on the arguments after its name; raises a `UserError` for a mistake


class ArgumentParser(argparse.ArgumentParser):
    """A parser of whole flags that raises a `UserError` for a mistake.

    Args:
        program: what to type before the flags, such as "python -m resnet_jax predict".
        description: shown by --help as it is.
    """

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a mistake."""
        stray = message.removeprefix("unrecognized arguments: ")
        if stray.partition(":")[0] in _shipped_names() and "--config CONFIG" in self.format_usage():
            raise UserError(f"{message}: did you mean --config {stray}? See {self.prog} --help")
        raise UserError(f"{message}: see {self.prog} --help")


def seconds(text: str) -> float:
    """The type of a flag that takes a finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def whole_number(low: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number, at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low}, got {text!r}")
        return int(text)

    return parse


def local_path(text: str) -> Path:
    """The type of a flag that takes a path, in which `~` is the home folder, also where the shell leaves it: `--output=~/x`."""
    return Path(os.path.expanduser(text))


def say_loading(run: object) -> None:
    """Say on a terminal that a network is being loaded, which takes seconds; elsewhere stderr holds only what is wrong."""
    if sys.stderr.isatty():
        print(f"loading {run} ...", file=sys.stderr, flush=True)


def folder(path: str | os.PathLike[str], flag: str = "--workdir") -> Path:
    """The absolute path of a folder, which need not exist.

    Raises:
        UserError: if it cannot be a path on this machine.
    """
    text = os.fspath(path)
    if not text or not text.isprintable() or "://" in text:
        raise UserError(f"{flag} {text!r} is not the path of a folder: give a path (mount a bucket to use one)")
    return Path(os.path.expanduser(text)).absolute()


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add `--config` and show its overrides in the help; `parse_config` parses them."""
    parser.add_argument(
        "--config",
        action="append",
        metavar="CONFIG",
        help="config file, with :variant if it has variants; or a shipped config by name "
        f"({', '.join(_shipped_names())}); or the config.json of a run",
    )
    add_override_argument(parser)


def add_checkpoint_argument(parser: ArgumentParser) -> None:
    """Add `--checkpoint`."""
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best, latest or a step (default: best)")


def add_views_argument(parser: ArgumentParser) -> None:
    """Add `--views`, for which `steps.average_over_views` says what each number stands for."""
    parser.add_argument(
        "--views",
        type=int,
        choices=config_lib.VIEWS,
        default=1,
        help="average the logits of the image and its mirror image (2), or of both and their copies moved by a pixel (6)",
    )


def add_override_argument(parser: ArgumentParser) -> None:
    """Show `--config.FIELD` in the help; `split_overrides` takes it from the command line."""
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", help="override a field, as in --config.optim.learning_rate=0.003"
    )


def parse_config(
    parser: ArgumentParser, argv: Sequence[str], extra_fields: Mapping[str, Field] = MappingProxyType({})
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse the command line of a tool that takes a config.

    Args:
        parser: has the arguments of `add_config_arguments`.
        argv: the arguments after the tool's name.
        extra_fields: as `config.validate` takes them.

    Returns:
        The arguments, with `config` as it was typed, and the config, validated and locked.

    Raises:
        UserError: for a mistake in the flags or the config.
    """
    rest, overrides = split_overrides(argv)
    arguments = parser.parse_args(rest)
    sources = arguments.config or []
    if not sources:
        raise UserError("--config is missing: give one, as in --config configs/final.py or --config final")
    if len(sources) > 1:
        raise UserError(f"--config is given {len(sources)} times: give it once")
    (arguments.config,) = sources
    return arguments, load_config(arguments.config, overrides, extra_fields)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that are not `--config.FIELD=VALUE` and those that are.

    Raises:
        UserError: if an override has no value.
    """
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override} has no value: give {override}=VALUE")
    return [argument for argument in argv if not argument.startswith("--config.")], overrides


def load_config(
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    extra_fields: Mapping[str, Field] = MappingProxyType({}),
) -> ConfigDict:
    """Load a config.

    Args:
        source: a config file, with :variant if it has variants; the name of a shipped config; or a run's `config.json`.
        overrides: "--config.FIELD=VALUE".
        extra_fields: as `config.validate` takes them.

    Returns:
        The config, validated and locked.

    Raises:
        UserError: if there is no such config, it fails, or a field is unknown or out of its range.
    """
    file, variant = config_file(source)
    fields = config_lib.ALL_FIELDS | dict(extra_fields)
    for override in overrides:
        config_lib.check_name(override.partition("=")[0].removeprefix("--config."), fields)
    values, argv = flags.FlagValues(), ["", *overrides]
    try:
        if file.suffix == ".json":
            if variant:
                raise UserError(f"--config {source}: a config.json has no variants: leave out {variant}")
            stored = stored_config.from_json(files.read_json(file, hint="give another --config"), extra_fields)
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=argv)
        else:
            _make_configs_importable(file)
            config = stored_config.with_floats(_get_config(file, variant), fields)
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
        config = values["config"].value
    except UserError:
        raise
    except flags.IllegalFlagValueError as error:
        for override in overrides:
            if str(error).startswith(f"flag {override}: "):
                name, _, value = override.removeprefix("--config.").partition("=")
                raise UserError(f"config.{name} is {value!r}: it must be {fields[name].words}") from error
        raise UserError(_reason(error)) from error
    except SystemExit as error:
        raise UserError(f"{file} exits with {error.code!r}: get_config() must return a ConfigDict") from error
    except Exception as error:
        raise UserError(_reason(error)) from error
    config_lib.validate(config, extra_fields)
    return config


def _get_config(file: Path, variant: str) -> ConfigDict:
    """Run a config file, and return what its `get_config` does; `variant` is ":NAME" or "".

    `config_flags.DEFINE_config_file` would use `load_module`, which Python 3.15 no longer has.
    """
    name = f"config {file}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(file)))
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for it
    spec.loader.exec_module(module)
    config = module.get_config(*([variant.removeprefix(":")] if variant else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {config!r}: it must return a ConfigDict")
    return config


def default_workdir(source: str) -> Path:
    """The workdir of a config: runs/NAME[-variant], or the run's own folder for its `config.json`."""
    file, variant = config_file(source)
    return file.parent if file.name == "config.json" else Path("runs") / (file.stem + variant.replace(":", "-", 1))


def config_file(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """The file of a config, and ":variant" or "".

    Raises:
        UserError: if there is no such file and no shipped config of that name.
    """
    pieces = os.fspath(source).split(":")
    names = (":".join(pieces[:count]) for count in range(1, len(pieces) + 1))  # a folder's name may have a colon
    name = next((name for name in names if Path(os.path.expanduser(name)).is_file()), pieces[0])
    variant = os.fspath(source)[len(name) :]
    file = Path(os.path.expanduser(name))
    if not file.is_file() and name in _shipped_names():
        file = host.CONFIGS / f"{name}.py"
    if not file.is_file():
        near = difflib.get_close_matches(name, _shipped_names(), 1)
        hint = f"did you mean {near[0]}? Give" if near else "give"
        raise UserError(f"--config {name} is not a file: {hint} a config file, or one of {', '.join(_shipped_names())}")
    return file, variant if variant != ":" else ""


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in host.CONFIGS.glob("*.py"))


def _make_configs_importable(file: Path) -> None:
    """Let a config file import others, as in `from configs import final`, inside a checkout or not.

    Those beside it come first, if its folder is called configs, then the shipped ones.
    """
    package = ModuleType("configs")
    package.__path__ = [str(path) for path in (file.absolute().parent, host.CONFIGS) if path.name == "configs"]
    sys.modules.setdefault("configs", package)


def _reason(error: Exception) -> str:
    """What went wrong while the config was loaded, and where in its file."""
    reason = str(error).strip()
    if "Traceback" in reason:
        reason = reason.splitlines()[-1]
    if "get_config() takes 0 positional arguments" in reason:
        return "--config: this config has no variants: leave out the colon and what follows it"
    if not isinstance(error, flags.Error):
        kind = "no such field" if isinstance(error, (AttributeError, KeyError)) else type(error).__name__
        quoted = r"\\n|\\'|'|\""  # ml_collections' messages come as the repr of a repr
        reason = f"--config: {kind}: {re.sub(quoted, ' ', reason)}"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename != __file__ and not re.search(r"site-packages|<frozen", f.filename)
    ]
    return reason + (f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else "")


def _check_address_space() -> None:
    """Refuse a limit under which JAX and TensorFlow crash or hang in C++, where no exception can be caught."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise UserError(
            f"this process may address only {limit / 1e9:.1f} GB of memory, and JAX and TensorFlow need "
            f"{_ADDRESS_SPACE / 1e9:.0f} GB: raise the limit, with ulimit -v"
        )


def run(main: Tool) -> NoReturn:
    """Run a tool as a program: its mistakes are one line and exit code 2, and libraries are quiet, also when it ends."""
    sys.unraisablehook = hide_closed_loops
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8, an ASCII locale
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ
    code = 0
    try:
        with exit_on_user_error():
            _check_address_space()
            main(sys.argv[1:])
            if sys.stdout:  # None once nobody reads it
                sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code != 2 and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.exit(code)  # JAX then takes leave of the other processes
    exit_immediately(code)
