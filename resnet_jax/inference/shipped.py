"""The trained weights that ship with the code, by name: `load("final-cifar10")`."""

import os
from pathlib import Path

from resnet_jax import host

FOLDER = host.CONFIGS.parent / "weights"  # beside the configs: in the repository, and in a wheel


def names() -> list[str]:
    """The names of the weights that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find(source: str | os.PathLike[str]) -> Path:
    """Return the file of the shipped weights that `source` names; the path `source` if it exists or names none."""
    path = Path(os.path.expanduser(source))
    return FOLDER / f"{path}.safetensors" if str(path) in names() and not path.exists() else path


def is_file_of(source: str | os.PathLike[str], path: Path) -> bool:
    """Whether `path` is, perhaps through a link, the file that `find` returns."""
    return path.exists() and path.resolve() == find(source).resolve()
