"""The version of this code, and cores and paths of this machine: the package's templates and configs."""

import os
from pathlib import Path

VERSION = "0.2.0"
_PACKAGE = Path(__file__).parent
CHECKOUT = _PACKAGE.parent  # the repository, unless the package was installed from a wheel
TEMPLATES = _PACKAGE / "templates"  # of pages and model cards
CONFIGS = _PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = CHECKOUT / "configs"


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
