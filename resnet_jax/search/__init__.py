"""Search for a network and a recipe under a budget, on one machine or many, in the stages of the report."""

from pathlib import Path

STAGES = ("grid", "refine", "confirm")


def default_workdir(study: str) -> Path:
    """The folder of a search's runs where none is given."""
    return Path("runs/search") / study


def default_storage(workdir: Path) -> Path:
    """The journal of a search where no storage is given."""
    return workdir / "study.journal"
