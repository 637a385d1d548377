"""The page about a search, and the config that it found: `python -m resnet_jax search report`."""

import hashlib
import json
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.errors import UserError
from resnet_jax.reporting import pages, statistics
from resnet_jax.reporting.pages import Picture
from resnet_jax.runs import files
from resnet_jax.search import figures, space, studies
from resnet_jax.search.fields import SEARCH_FIELDS
from resnet_jax.search.summary import Summary, costs_against, summarise

_MARK = '"""Found by `python -m resnet_jax search`'  # begins the file of a config that was found


def pictures(found: Summary) -> list[Picture]:
    """The figures that can be drawn of a search."""
    drawn = [
        Picture("history", "Validation accuracy of all trials that had any.", partial(figures.draw_history, found))
    ]
    complete = sum(row["accuracy"] is not None for rows in found["trials"].values() for row in rows)
    if complete:
        drawn.append(Picture("pareto", f"{complete} complete trials.", partial(figures.draw_pareto, found)))
    if "accuracy" in (columns := figures.columns(found)):
        caption = "Parallel coordinates: what differs among the complete trials of grid and refinement."
        drawn.append(Picture("parallel", caption, partial(figures.draw_parallel, columns), wide=True))
    for stage, shares in found["importances"].items():
        if shares:
            count = sum(row["accuracy"] is not None for row in found["trials"][stage])
            caption = f"fANOVA over {count} complete trials: of few, a hint at most."
            drawn.append(Picture(f"importances_{stage}", caption, partial(figures.draw_importances, found, stage)))
    return drawn


def page(found: Summary, config_path: Path, folder: Path) -> str:
    """The page, whose figures are drawn into a folder."""
    counts = {
        stage: {state: sum(row["state"] == state for row in rows) for state in dict.fromkeys(r["state"] for r in rows)}
        for stage, rows in found["trials"].items()
    }
    ranked = [
        {"stage": stage, **row} for stage in ("grid", "refine") for row in found["trials"].get(stage, [])
        if row["accuracy"] is not None
    ]  # fmt: skip
    return pages.render(
        "search.html",
        pictures(found),
        found["environments"],
        folder,
        found=found,
        counts=counts,
        ranked=sorted(ranked, key=lambda row: -row["accuracy"])[:10],
        name=space.name,
        spread=statistics.mean_and_spread,
        config_path=config_path,
        against=costs_against(found),
    )


def found_config(found: Summary, path: Path) -> str:
    """The text of the file of the config that was found: the search's, with the best candidate's fields."""
    config = space.training_config(config_lib.from_json(found["config"], SEARCH_FIELDS), found["best"])
    what = "one trial"
    for entry in found["confirmed"]:
        if entry["best"]:
            accuracies = [*entry["accuracies"].values()]
            what = f"{statistics.mean_and_spread(accuracies)} on validation, {len(accuracies)} seeds"
    lines = [
        f"{_MARK}, study {found['study']}: {what}.",
        "",
        f"python launch.py --config {path}    # as in the search; --config.num_epochs=50.0 trains for longer",
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """The config, whole."""',
        *("    " + line for line in _as_python("config", config)),
        "    return config",
    ]
    return _signed("\n".join(lines) + "\n")


def _as_python(name: str, config: ConfigDict) -> list[str]:
    """The lines that build a config."""
    lines = [f"{name} = ConfigDict()"]
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            lines += _as_python(f"{name}.{key}", value)
        else:
            lines.append(f"{name}.{key} = {json.dumps(value) if isinstance(value, str) else repr(value)}")
    return lines


def _signed(text: str) -> str:
    """A text and its digest in a comment, by which it can be told whether it was edited."""
    return f"{text}\n\n# {hashlib.sha256(text.encode()).hexdigest()}, of the lines above: an edited file is not written over\n"


def _check_found(path: Path, study: str) -> None:
    """Refuse to write over a file that is not, as it stands, what this was written to for the same search.

    Raises:
        UserError: where it is there and is something else, or its folder is not there.
    """
    hint = "give another with --found"
    if not path.parent.is_dir():
        raise UserError(f"--found {path}: there is no folder {path.parent}: make it, or {hint}")
    if not path.exists():
        return
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--found {path} cannot be read ({error}): {hint}") from error
    known = text.replace("resnet_jax.search`", "resnet_jax search`", 1)  # earlier versions wrote that
    if not known.startswith(f"{_MARK}, study {study}: ") or text != _signed(text.rpartition("\n\n# ")[0]):
        raise UserError(f"--found {path} is there, and is of something else or was edited: {hint}")


def _check_summary(path: Path) -> None:
    """Refuse to write over a file that is no summary of a search.

    Raises:
        UserError: where it is there and is something else.
    """
    if path.exists():
        files.read_json(
            path, ("study", "trials", "confirmed"), "--summary writes over an earlier summary alone: give another"
        )


def save_summary(study: str, where: str, path: Path) -> None:
    """Write the summary of a search as JSON.

    Raises:
        UserError: if there is no such search, or the file is something else than an earlier summary.
    """
    _check_summary(path)
    with studies.opened(where, create=False) as storage:
        files.write_json(path, summarise(study, studies.existing(storage, study)))
    print(path)


def save_page(study: str, where: str, output: Path, config_path: Path) -> None:
    """Write the page of a search into a folder, and the config that it found, if it found one.

    Raises:
        UserError: if there is no such search, or the folder or the config cannot be written.
    """
    if output.absolute() in config_path.absolute().parents:
        raise UserError(f"--found {config_path} is in --output {output}, which holds only the page: give another file")
    pages.check_output(output)
    _check_found(config_path, study)
    with studies.opened(where, create=False) as storage:
        found = summarise(study, studies.existing(storage, study))
    write(found, output, config_path)


def write(found: Summary, output: Path, config_path: Path) -> None:
    """Write the page of a search, and the config that it found, if it found one."""
    with pages.writing(output) as folder:
        (folder / "index.html").write_text(page(found, config_path, folder / "figures"))
    print(output / "index.html")
    if found["best"]:
        files.write_text(config_path, found_config(found, config_path))
        print(config_path)
