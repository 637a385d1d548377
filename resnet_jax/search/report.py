"""Write the page about a search and the config that it found: `python -m resnet_jax search report`."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax.disk import files
from resnet_jax.errors import UserError, reason
from resnet_jax.reporting import pages, statistics
from resnet_jax.reporting.pages import Picture
from resnet_jax.runs import stored_config
from resnet_jax.search import figures, space, studies
from resnet_jax.search.fields import SEARCH_FIELDS
from resnet_jax.search.summary import Summary, summarise

_MARK = '"""Found by `python -m resnet_jax search`'  # the start of the file of a found config


def pictures(search: Summary) -> list[Picture]:
    """List the figures that can be drawn for a search."""
    drawn = [
        Picture(
            "history",
            "Validation accuracy of every trial that has been evaluated.",
            partial(figures.draw_history, search),
        )
    ]
    complete = sum(row["accuracy"] is not None for rows in search["trials"].values() for row in rows)
    if complete:
        drawn.append(
            Picture(
                "pareto", f"Accuracy against cost of {complete} complete trials.", partial(figures.draw_pareto, search)
            )
        )
    if "accuracy" in (columns := figures.columns(search)):
        caption = (
            "Parallel coordinates of the complete trials of grid and refine: one line per trial, one axis per value "
            "that differs. The more accurate a trial, the stronger its line; the thick line is the best."
        )
        drawn.append(Picture("parallel", caption, partial(figures.draw_parallel, columns), wide=True))
    for stage, shares in search["importances"].items():
        if shares:
            count = sum(row["accuracy"] is not None for row in search["trials"][stage])
            caption = f"Importances by fANOVA over {count} complete trials; with few trials, only a hint."
            drawn.append(Picture(f"importances_{stage}", caption, partial(figures.draw_importances, search, stage)))
    return drawn


def page(search: Summary, config_path: Path, folder: Path) -> str:
    """Return the page as HTML, and draw its figures into `folder`."""
    counts = {
        stage: {state: sum(row["state"] == state for row in rows) for state in dict.fromkeys(r["state"] for r in rows)}
        for stage, rows in search["trials"].items()
    }
    ranked = [
        {"stage": stage, **row} for stage in ("grid", "refine") for row in search["trials"].get(stage, [])
        if row["accuracy"] is not None
    ]  # fmt: skip
    return pages.render(
        "search.html",
        pictures(search),
        search["environments"],
        folder,
        found=search,
        seeds=sorted({seed for entry in search["confirmed"] for seed in entry["accuracies"]}, key=int),
        over=any(entry["over_budget"] for entry in search["confirmed"]),
        counts=counts,
        ranked=sorted(ranked, key=lambda row: -row["accuracy"])[:10],
        name=space.name,
        spread=statistics.mean_and_spread,
        config_path=config_path,
    )


def found_config(search: Summary, path: Path) -> str:
    """Return the text of a config file: the search's config with the best candidate's fields."""
    config = space.training_config(stored_config.from_json(search["config"], SEARCH_FIELDS), search["best"])
    what = "one trial"
    for entry in search["confirmed"]:
        if entry["best"]:
            accuracies = [*entry["accuracies"].values()]
            what = f"{statistics.mean_and_spread(accuracies)} on validation, {len(accuracies)} seeds"
    lines = [
        f"{_MARK}, study {search['study']}: {what}.",
        "",
        f"python launch.py --config {path}    # as many epochs as in the search; for more: --config.num_epochs=50.0",
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """The whole config."""',
        *("    " + line for line in _as_python("config", config)),
        "    return config",
    ]
    return _signed("\n".join(lines) + "\n")


def _as_python(name: str, config: ConfigDict) -> list[str]:
    """Return the lines of Python that build a config."""
    lines = [f"{name} = ConfigDict()"]
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            lines += _as_python(f"{name}.{key}", value)
        else:
            lines.append(f"{name}.{key} = {json.dumps(value) if isinstance(value, str) else repr(value)}")
    return lines


def _signed(text: str) -> str:
    """Append a comment with the digest of the text, which shows whether somebody edited it."""
    return f"{text}\n\n# {_digest(text)}, digest of the lines above: an edited file is not overwritten\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_found(path: Path, study: str) -> None:
    """Check that a file can be written: only an unedited found config of the same search is overwritten.

    Raises:
        UserError: if the file is something else, or its folder does not exist.
    """
    hint = "give another file with --found"
    if not path.parent.is_dir():
        raise UserError(f"--found {path}: the folder {path.parent} does not exist: create it, or {hint}")
    if not path.exists():
        return
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--found {path} cannot be read ({error}): {hint}") from error
    lines, _, signature = text.rpartition("\n\n# ")
    unedited = re.fullmatch(rf"{_digest(lines)}, .*\n", signature)  # the words after the digest may differ
    known = text.replace("resnet_jax.search`", "resnet_jax search`", 1)  # an earlier spelling of the command
    if not known.startswith(f"{_MARK}, study {study}: ") or not unedited:
        raise UserError(f"--found {path} exists, and was edited or belongs to something else: {hint}")


def read(study: str, where: str) -> Summary:
    """Read the summary of a search from its storage.

    Raises:
        UserError: if there is no such search, or the storage holds values that no search wrote.
    """
    with studies.opened(where, create=False) as storage:
        try:
            return summarise(study, studies.existing(storage, study))
        except UserError:
            raise
        except Exception as error:  # a line of a journal that was edited can hold anything
            raise UserError(
                f"--study {study} cannot be read ({reason(error)}): restore its storage from a backup"
            ) from error


def save_summary(study: str, where: str, path: Path) -> None:
    """Write the summary of a search as JSON.

    Raises:
        UserError: if there is no such search, or the file is something else than an earlier summary.
    """
    pages.check_summary(path, ("study", "trials", "confirmed"), "search")
    files.write_json(path, read(study, where))
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
    write(read(study, where), output, config_path)


def write(search: Summary, output: Path, config_path: Path) -> None:
    """Write the page of a search, and the config that it found, if it found one."""
    with pages.writing(output) as folder:
        (folder / "index.html").write_text(page(search, config_path, folder / "figures"), "utf-8")
    print(output / "index.html")
    if search["best"]:
        files.write_text(config_path, found_config(search, config_path))
        print(config_path)
