"""Search for a network and a recipe under a budget, on one machine or many, in the stages of the report."""

import re
from pathlib import Path

from resnet_jax.errors import UserError

STAGES = ("grid", "refine", "confirm")


def default_workdir(study: str) -> Path:
    """The folder of a search's runs where none is given."""
    return Path("runs/search") / study


def default_storage(workdir: Path) -> Path:
    """The journal of a search where no storage is given."""
    return workdir / "study.journal"


def is_name(study: str) -> bool:
    """Whether a search can have this name, which is part of paths."""
    return re.fullmatch(r"[\w.-]*\w", study) is not None


def check_folder(root: Path, claimed: bool = False) -> None:
    """Refuse a folder that holds runs of a search; one that has been claimed, perhaps by the same search, only if asked to.

    Raises:
        UserError: where it does.
    """
    trials = [p.name for p in sorted(root.glob("*")) if re.fullmatch(rf"({'|'.join(STAGES)})-\d{{4,}}", p.name)]
    if trials and (claimed or not (root / ".claim").exists()):
        raise UserError(f"--workdir {root} holds {trials[0]} of another search: give another folder")
