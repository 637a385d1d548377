"""The version of this code, and what belongs to the machine: its cores, and the paths of templates and configs."""

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
