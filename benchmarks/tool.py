"""What the tools of this folder share: flags, checks before anything is measured, and how a result is written."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.cli import command_line
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--output`, which must be given."""
    parser.add_argument(
        "--output", type=command_line.local_path, required=True, metavar="FILE", help="JSON file to write"
    )


def whole_numbers(text: str) -> list[int]:
    """The type of a flag that takes whole numbers, separated by commas."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"must be whole numbers >= 1, separated by commas, got {text!r}")
    return [int(number) for number in numbers]


def check_output(path: Path) -> None:
    """Check that the output file can be written, before anything is measured."""
    try:
        with files.scratch_directory(path.parent):
            is_folder = path.is_dir()
    except OSError:
        is_folder = True
    if is_folder:
        raise UserError(f"--output {path} cannot be written: give a file in a folder that exists and is writable")


def find_torch_python(program: str) -> str:
    """Return the path of `--torch-python`."""
    path = shutil.which(program)
    if path is None:
        raise UserError(f"--torch-python {program} is not a program: give a Python that has PyTorch")
    return path


def described(result: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """Return a result with its config and this machine."""
    from resnet_jax.runs import environment  # not before the tool has set what JAX reads as it starts

    return result | {"config": stored_config.to_json(config), "environment": environment.collect()}


def write_result(path: Path, result: dict[str, Any], config: ConfigDict) -> None:
    """Write a `described` result, and print its path."""
    files.write_json(path, described(result, config))
    print(path)
