"""Pages of figures and tables, each one file that shows all it needs, on light and dark screens of any width."""

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from resnet_jax import host
from resnet_jax.errors import UserError
from resnet_jax.reporting import figures
from resnet_jax.runs import files

_GENERATOR = '<meta name="generator" content="resnet_jax">'  # in a page's head


class Picture(NamedTuple):
    """A figure of the page.

    Attributes:
        name: of its files.
        caption: what it shows, and which figure of the report it repeats.
        draw: draws it.
        wide: takes the width of the page.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]
    wide: bool = False


def check_output(directory: Path) -> None:
    """Refuse a folder that holds anything else than a page, which would be lost, before anything is computed.

    Raises:
        UserError: where it does.
    """
    try:
        held = {str(path.relative_to(directory)) for path in directory.rglob("*")} if directory.exists() else set()
        page = (directory / "index.html").read_text(errors="replace") if "index.html" in held else ""
    except OSError as error:
        raise UserError(f"--output {directory} cannot be read ({error.strerror}): give a new folder") from error
    others = sorted(name for name in held if not re.fullmatch(r"index\.html|figures(/\w+\.(png|svg))?", name))
    if others or (held and _GENERATOR not in page) or (directory.exists() and not directory.is_dir()):
        what = f", {others[0]}" if others else ""
        raise UserError(f"--output {directory} holds something else than a report{what}: give a new folder")


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """A scratch folder, with an empty `figures` in it, that takes the place of an earlier page if nothing is raised."""
    with files.atomic_directory(directory, replace=True) as new:
        (new / "figures").mkdir(parents=True)
        yield new


def render(
    template: str, pictures: Sequence[Picture], environments: Sequence[dict[str, Any]], folder: Path, **values: Any
) -> str:
    """The page of a template that extends `page.html`.

    Args:
        template: its path in this package.
        pictures: are drawn into the folder for light paper; those for dark screens go into the page alone.
        environments: of the runs that it is about.
        folder: of the figures.
        values: for the template.
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
    """Where and by which code a run was made, from its environment."""
    git = environment.get("git")
    commit = f", commit {git['commit'][:12]}{' with changes' * git['dirty']}" if git else ""
    devices = environment["devices"]
    count = environment["cpu_count"]
    cores = f", {count} core{'s' * (count > 1)}" if environment["backend"] == "cpu" else ""
    jax = environment["versions"].get("jax", "?")
    return f"{len(devices)} x {devices[0]}{cores}, Python {environment['python']}, jax {jax}{commit}"
