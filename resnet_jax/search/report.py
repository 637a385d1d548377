"""A page about a search, and the best config that it found.

    python -m resnet_jax.search report --study NAME

DIR/index.html needs no other file; DIR/figures holds each figure as PNG and SVG. --found is a config that launch.py runs.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.command_line import ArgumentParser
from resnet_jax.errors import UserError, exit_on_user_error
from resnet_jax.reporting import pages, statistics
from resnet_jax.reporting.pages import Picture
from resnet_jax.runs import files
from resnet_jax.search import default_storage, default_workdir, figures, is_name, space, studies
from resnet_jax.search.fields import SEARCH_FIELDS
from resnet_jax.search.summary import Summary, summarise

_MARK = '"""Found by `python -m resnet_jax.search`'  # the first words of a found config's file


def pictures(found: Summary) -> list[Picture]:
    """The figures that can be drawn for a search."""
    drawn = [
        Picture(
            "history",
            "Validation accuracy of every trial that has been evaluated.",
            partial(figures.draw_history, found),
        )
    ]
    complete = sum(row["accuracy"] is not None for rows in found["trials"].values() for row in rows)
    if complete:
        drawn.append(
            Picture(
                "pareto", f"Accuracy against cost of {complete} complete trials.", partial(figures.draw_pareto, found)
            )
        )
    if "accuracy" in (columns := figures.columns(found)):
        caption = (
            "Parallel coordinates of the complete trials of grid and refine: one line per trial, one axis per value "
            "that differs. The more accurate a trial, the stronger its line; the thick line is the best."
        )
        drawn.append(Picture("parallel", caption, partial(figures.draw_parallel, columns), wide=True))
    for stage, shares in found["importances"].items():
        if shares:
            count = sum(row["accuracy"] is not None for row in found["trials"][stage])
            caption = f"Importances by fANOVA over {count} complete trials; with few trials, only a hint."
            drawn.append(Picture(f"importances_{stage}", caption, partial(figures.draw_importances, found, stage)))
    return drawn


def page(found: Summary, config_path: Path, folder: Path) -> str:
    """The page. Its figures are drawn into `folder`."""
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
        seeds=sorted({seed for entry in found["confirmed"] for seed in entry["accuracies"]}, key=int),
        over=any(entry["over_budget"] for entry in found["confirmed"]),
        counts=counts,
        ranked=sorted(ranked, key=lambda row: -row["accuracy"])[:10],
        name=space.name,
        spread=statistics.mean_and_spread,
        config_path=config_path,
    )


def found_config(found: Summary, path: Path) -> str:
    """The text of a config file: the search's config with the best candidate's fields."""
    config = space.training_config(config_lib.from_json(found["config"], SEARCH_FIELDS), found["best"])
    what = "one trial"
    for entry in found["confirmed"]:
        if entry["best"]:
            accuracies = [*entry["accuracies"].values()]
            what = f"{statistics.mean_and_spread(accuracies)} on validation, {len(accuracies)} seeds"
    lines = [
        f"{_MARK}, study {found['study']}: {what}.",
        "",
        f"python launch.py --config {path}    # as long as in the search; for longer: --config.num_epochs=50.0",
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
    """The lines of Python that build a config."""
    lines = [f"{name} = ConfigDict()"]
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            lines += _as_python(f"{name}.{key}", value)
        else:
            lines.append(f"{name}.{key} = {json.dumps(value) if isinstance(value, str) else repr(value)}")
    return lines


def _signed(text: str) -> str:
    """A text with its digest in a comment, which shows whether somebody edited it."""
    return f"{text}\n\n# {_digest(text)}, digest of the lines above: an edited file is not overwritten\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_found(path: Path, study: str) -> None:
    """Check that a file can be written: only an unedited found config of the same search is overwritten.

    Raises:
        UserError: where the file is something else, or its folder does not exist.
    """
    hint = "give another file with --found"
    if not path.parent.is_dir():
        raise UserError(f"--found {path}: the folder {path.parent} does not exist: create it, or {hint}")
    if not path.exists():
        return
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--found {path} cannot be read ({error}): {hint}") from error
    lines, _, signature = text.rpartition("\n\n# ")
    unedited = re.fullmatch(rf"{_digest(lines)}, .*\n", signature)  # whatever words an earlier version wrote after it
    if not text.startswith(f"{_MARK}, study {study}: ") or not unedited:
        raise UserError(f"--found {path} exists, and was edited or belongs to something else: {hint}")


def _check_summary(path: Path) -> None:
    """Check that a file can be written: only the summary of a search is overwritten.

    Raises:
        UserError: where the file is something else.
    """
    if path.exists():
        files.read_json(
            path,
            ("study", "trials", "confirmed"),
            "--summary overwrites only the summary of a search: give another file",
        )


def main(argv: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser("resnet_jax.search report", __doc__)
    parser.add_argument("--study", required=True, metavar="NAME", help="name of the search")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="of the search (default: runs/search/NAME)")
    parser.add_argument("--storage", metavar="WHERE", help="of the search (default: WORKDIR/study.journal)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the page (default: report-NAME)")
    parser.add_argument("--found", type=Path, metavar="FILE", default=Path("configs/found.py"), help="config to write")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the search's summary, as JSON, instead")
    arguments = parser.parse_args(argv)
    output, name = arguments.output or Path(f"report-{arguments.study}"), arguments.study
    where = arguments.storage or str(default_storage(arguments.workdir or default_workdir(name)))
    with exit_on_user_error():
        if not is_name(name):
            raise UserError(f"--study is {name!r}: give the name of a search")
        if arguments.summary:
            _check_summary(arguments.summary)
        else:
            if output.absolute() in arguments.found.absolute().parents:
                raise UserError(
                    f"--found {arguments.found} is in --output {output}, which is only for the page: give another file"
                )
            pages.check_output(output)
            _check_found(arguments.found, name)
        with studies.opened(where, create=False) as storage:
            found = summarise(name, studies.existing(storage, name))
        if arguments.summary:
            files.write_json(arguments.summary, found)
            print(arguments.summary)
            return
        write(found, output, arguments.found)


def write(found: Summary, output: Path, config_path: Path) -> None:
    """Write the page of a search and, if a trial has completed, the best config."""
    with pages.writing(output) as folder:
        (folder / "index.html").write_text(page(found, config_path, folder / "figures"))
    print(output / "index.html")
    if found["best"]:
        files.write_text(config_path, found_config(found, config_path))
        print(config_path)
