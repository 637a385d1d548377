"""Search for a network and a recipe within a budget, in the stages of the report, on one or several machines."""

import re
from pathlib import Path

from resnet_jax.errors import UserError

STAGES = ("grid", "refine", "confirm")


def default_workdir(study: str) -> Path:
    """Return the default folder of a search's runs."""
    return Path("runs/search") / study


def default_storage(workdir: Path) -> Path:
    """Return the default storage of a search, a journal file."""
    return workdir / "study.journal"


def is_name(study: str) -> bool:
    """Whether a search can have this name, which becomes part of paths."""
    return re.fullmatch(r"[\w.-]*\w", study) is not None


def check_folder(root: Path, claimed: bool = False) -> None:
    """Refuse a folder that holds trials of another search.

    A folder with a `.claim` may belong to the same search: it is refused only if `claimed`.

    Raises:
        UserError: if the folder holds trials.
    """
    trials = [p.name for p in sorted(root.glob("*")) if re.fullmatch(rf"({'|'.join(STAGES)})-\d{{4,}}", p.name)]
    if trials and (claimed or not (root / ".claim").exists()):
        raise UserError(f"--workdir {root} holds {trials[0]} of another search: choose another folder")
