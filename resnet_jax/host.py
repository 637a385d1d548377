"""The version of this code, and what belongs to the machine: its cores, files, and the paths of templates and configs."""

import errno
import os
from pathlib import Path

__version__ = "0.2.0"
_PACKAGE = Path(__file__).parent
CHECKOUT = _PACKAGE.parent  # the repository, unless the package was installed from a wheel
TEMPLATES = _PACKAGE / "templates"  # of pages and model cards
CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else CHECKOUT) / "configs"  # the former in a wheel


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readable(path: Path) -> Path:
    """Return a path that can be opened without waiting for another process.

    Raises:
        OSError: if it is that of a pipe, a socket or a device.
    """
    if path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file")
    return path
