"""Pages of figures and tables. Each is one HTML file that needs no other, for light and dark screens of any width."""

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from resnet_jax import host
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.reporting import figures

_GENERATOR = '<meta name="generator" content="resnet_jax">'  # in a page's head


class Picture(NamedTuple):
    """A figure of the page.

    Attributes:
        name: stem of its file names.
        caption: what the figure shows.
        draw: returns the figure.
        wide: whether it takes the whole width of the page.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]
    wide: bool = False


def check_output(directory: Path) -> None:
    """Check, before anything is computed, that writing a page to a folder would delete nothing but an earlier page.

    Raises:
        UserError: if the folder holds something else.
    """
    try:
        names = {str(path.relative_to(directory)) for path in directory.rglob("*")} if directory.exists() else set()
        page = (directory / "index.html").read_text(errors="replace") if "index.html" in names else ""
    except OSError as error:
        raise UserError(f"--output {directory} cannot be read ({error.strerror}): give a new folder") from error
    others = sorted(name for name in names if not re.fullmatch(r"index\.html|figures(/\w+\.(png|svg))?", name))
    if others or (names and _GENERATOR not in page) or (directory.exists() and not directory.is_dir()):
        what = f" ({others[0]})" if others else ""
        raise UserError(f"--output {directory} holds files that are not a report{what}: give a new folder")


def check_summary(path: Path, keys: Iterable[str], what: str) -> None:
    """Check that `--summary` overwrites nothing but the summary of a run or a search, which has these keys.

    Raises:
        UserError: if the file is something else.
    """
    if path.exists():
        files.read_json(path, keys, f"--summary overwrites only the summary of a {what}: give another file")


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """A temporary folder with an empty `figures` in it. It replaces `directory` unless the block raises."""
    with files.atomic_directory(directory, replace=True) as new:
        (new / "figures").mkdir(parents=True)
        yield new


def render(
    template: str, pictures: Sequence[Picture], environments: Sequence[dict[str, Any]], folder: Path, **values: Any
) -> str:
    """Draw the figures and render a template that extends `page.html`.

    Args:
        template: its name in `resnet_jax/templates`.
        pictures: the figures. The files are drawn for a light background; the page also holds a dark version.
        environments: the environments of the runs.
        folder: where to write the figures.
        values: the template's other variables.

    Returns:
        The page's HTML.
    """
    shown = []
    for picture in pictures:
        path = folder / picture.name
        dark = _data_uri(figures.save(picture.draw, path.with_suffix(".svg"), "dark"))
        light = _data_uri(figures.save(picture.draw, path.with_suffix(".svg"), "light"))
        figures.save(picture.draw, path.with_suffix(".png"), "light", "white")
        shown.append({**picture._asdict(), "light": light, "dark": dark})
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(host.TEMPLATES)
    )
    made_on = sorted({machine(environment) for environment in environments})
    return templates.get_template(template).render(pictures=shown, environments=made_on, **values)


def _data_uri(path: Path) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def machine(environment: dict[str, Any]) -> str:
    """The hardware, versions and commit of a run, in one line."""
    git = environment.get("git")
    commit = f", commit {git['commit'][:12]}{' with local changes' * git['dirty']}" if git else ""
    devices = environment["devices"]
    count = environment["cpu_count"]
    cores = f", {count} core{'s' * (count > 1)}" if environment["backend"] == "cpu" else ""
    jax = environment["versions"].get("jax", "?")
    return f"{len(devices)} x {devices[0]}{cores}, Python {environment['python']}, jax {jax}{commit}"
