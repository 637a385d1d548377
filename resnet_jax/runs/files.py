"""Files that are whole or not there: JSON and text replaced at once, folders that appear when they are complete."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that a reader sees the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one.

    Raises:
        UserError: where it cannot be written; the old one stays.
    """
    with writable(path):
        path = path.resolve()  # what a link stands for, and not the link
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is no file: give another")
    with writable(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".incomplete-") as scratch:
        new = Path(scratch) / path.name
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a failure to write into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): mend that, or choose another place") from error


def read_json(
    path: Path, keys: Iterable[str] = (), hint: str = "mend it, or choose another --workdir"
) -> dict[str, Any]:
    """Read a JSON object that has these keys; `hint` says what to do where it is not one.

    Raises:
        UserError: where it cannot be read, is no object or lacks a key.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): {hint}") from error
    return value


@contextmanager
def atomic_directory(directory: Path, replace: bool = False) -> Iterator[Path]:
    """A scratch folder, still to be made, that becomes `directory` if nothing is raised.

    Args:
        directory: that is not there yet, or is empty.
        replace: it takes the place of what is there.

    Raises:
        UserError: where it cannot be written; what is there stays.
    """
    with writable(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".incomplete-") as scratch:
            new = Path(scratch) / "new"
            yield new
            if replace and directory.exists():
                directory.rename(Path(scratch) / "old")
            new.rename(directory)
