"""Atomic files and folders: a reader sees the old content or the complete new content."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError

_SCRATCH = ".incomplete-resnet_jax-"


def digest(value: object) -> str:
    """Return the SHA-256 of a value as JSON, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        UserError: if it cannot be written; the old content stays.
    """
    with writable(path):
        path = path.resolve()  # the target of a link, not the link
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is not a regular file: give another")
    with writable(path), atomic_file(path) as new:
        new.write_text(text, "utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a new file to, which after the block replaces `path`; after an error the old file stays.

    Raises:
        OSError: if it cannot be written.
    """
    with scratch_directory(path.parent) as scratch:
        new = scratch / path.name
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is removed after the block, or by the next call there if its process is killed.

    A process holds a lock on its folder, which the kernel releases when it ends, so no folder in use is removed. Where a disk
    has no locks, those of killed processes stay.

    Raises:
        OSError: if it cannot be made.
    """
    remove_scratch(parent)
    with ExitStack() as stack:
        scratch = None
        while scratch is None or not scratch.exists():  # another process may remove it before it is locked
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=_SCRATCH)))
            with suppress(OSError):
                fcntl.flock(stack.enter_context(_open(scratch)), fcntl.LOCK_EX)
        yield scratch


def remove_scratch(parent: Path) -> None:
    """Remove the folders of `scratch_directory` whose processes have ended."""
    for path in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError), _open(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _open(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a failed write into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): fix this or choose another place") from error


def readable(path: Path) -> Path:
    """Return a path that can be opened without waiting for another process.

    Raises:
        OSError: if it is that of a pipe, a socket or a device.
    """
    if path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file")
    return path


def read_json(
    path: Path, keys: Iterable[str] = (), hint: str = "fix it, or choose another --workdir"
) -> dict[str, Any]:
    """Read a JSON object that must have these keys; `hint` says what to do if it cannot be used.

    Raises:
        UserError: if it cannot be read, is not an object or lacks a key.
    """
    try:
        value = json.loads(readable(path).read_text("utf-8"), parse_int=_int64)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): {hint}") from error
    return value


def _int64(digits: str) -> int:
    """Read a whole number of at most 64 bits: no field needs more, and floats cannot hold much larger ones."""
    value = int(digits)
    if abs(value) >= 2**63:
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return value


@contextmanager
def atomic_directory(directory: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a path for a scratch folder that becomes `directory` if nothing is raised.

    Args:
        directory: does not exist yet, or is empty.
        replace: replace a folder that exists.

    Raises:
        UserError: if it cannot be written; an existing folder stays.
    """
    with writable(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with scratch_directory(directory.parent) as scratch:
            new = scratch / "new"
            yield new
            if replace and directory.exists():
                directory.rename(scratch / "old")
            new.rename(directory)
