"""A model card of a run: its data, results, limits, recipe and digests, read from the run's files.

    python -m resnet_jax eval runs/final       # accuracy by class, calibration
    python -m resnet_jax card runs/final       # writes runs/final/MODEL_CARD.md

Mitchell et al., Model Cards for Model Reporting, arXiv:1810.03993. The header is in the format of the Hugging Face Hub.
"""

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy import stats

from resnet_jax import host
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.reporting import pages
from resnet_jax.runs import stored_config
from resnet_jax.runs.result import RunResult

_CONFUSIONS = 5  # listed under "Limits"


def _escaped(text: object) -> str:
    """Text on one line, escaped for Markdown."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(str(text).split()))


def _code(value: object) -> str:
    """A value as JSON, in the code style of Markdown, for a cell of a table."""
    text = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def by_class(test: dict[str, Any]) -> list[dict[str, Any]]:
    """Test accuracy and the most frequent wrong prediction of each class.

    Args:
        test: the "test" part of `eval.json`.

    Returns:
        [{"name", "count": test images, "accuracy": None without test images, "confused_with": a class or None, "confused":
        share of the class's images that are predicted as that}], the highest accuracy first.
    """
    names, confusion = list(test["accuracy_per_class"]), np.array(test["confusion"])
    classes = []
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        others = np.delete(row, i)
        most = int(np.argmax(others)) if others.size else 0
        other = names[most + (most >= i)] if others.any() else None
        count = int(row.sum())
        share = int(others.max(initial=0)) / max(count, 1)
        classes.append(
            {
                "name": name,
                "count": count,
                "accuracy": row[i] / count if count else None,
                "confused_with": other,
                "confused": share,
            }
        )
    return sorted(classes, key=lambda entry: (not entry["count"], -(entry["accuracy"] or 0)))


def card(directory: Path, shipped_as: str | None = None) -> str:
    """The card of a complete run that has been evaluated, in Markdown.

    Args:
        directory: the run's workdir.
        shipped_as: the name of its weights, if they ship with the package.

    Raises:
        UserError: if the run is not complete or not evaluated, its files do not match, or its checkpoint is corrupt.
    """
    result = RunResult.read(directory, "give another run")
    if not (directory / "eval.json").exists():
        raise UserError(f"{directory} was not evaluated: run python -m resnet_jax eval {directory} first")
    from resnet_jax import train_state  # after these checks, because JAX takes seconds to import
    from resnet_jax.inference import trained_model

    hint = f"evaluate the run again: python -m resnet_jax eval {directory}"
    evaluation = files.read_json(directory / "eval.json", ("checkpoint_step", "views", "dataset", "test"), hint)
    for key, stored, wanted in (
        ("checkpoint_step", evaluation["checkpoint_step"], result.checkpoint_step),
        ("dataset", _but_for_name(evaluation["dataset"]), _but_for_name(result.dataset)),
        ("views", evaluation["views"], 1),
    ):
        if stored != wanted:
            raise UserError(f"{directory / 'eval.json'} and result.json differ in the {key.replace('_', ' ')}: {hint}")

    model = trained_model.load(directory, result.checkpoint_step)
    templates = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(host.TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    to_json = partial(json.dumps, ensure_ascii=False)
    templates.filters |= {"md": _escaped, "json": to_json, "code": _code, "percent": "{:.2%}".format}
    try:
        test, config = evaluation["test"], stored_config.without_paths(stored_config.deciding(result.config))
        classes = by_class(test)
        confusion = np.array(test["confusion"])
        count, correct = int(confusion.sum()), int(np.trace(confusion))
        if count != result.dataset["splits"]["test"] or correct / count != test["accuracy"]:
            raise ValueError("the confusion matrix does not match the accuracy or the size of the test split")
        return templates.get_template("model_card.md").render(
            name=shipped_as or directory.resolve().name,
            shipped=shipped_as is not None,
            data=config["data.name"],
            model=model,
            digest=train_state.digest(model.variables),
            result=result,
            evaluation=evaluation,
            interval=stats.binomtest(correct, count).proportion_ci(0.95, "wilson"),
            confidence=sum(b["count"] * b["confidence"] for b in test["calibration"]["bins"]) / count,
            classes=classes,
            confusions=[c for c in sorted(classes, key=lambda c: -c["confused"]) if c["confused_with"]][:_CONFUSIONS],
            config=config,
            machine=pages.machine(result.environment),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise UserError(f"{directory}: result.json or eval.json is corrupt ({error!r}): {hint}") from error


def _but_for_name(dataset: Any) -> Any:
    """A description of data without the name, which may be a folder that has moved since."""
    return {key: value for key, value in dataset.items() if key != "name"} if isinstance(dataset, dict) else dataset


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m resnet_jax card", __doc__)
    parser.add_argument(
        "run", metavar="RUN", type=command_line.local_path, help="workdir of a complete run that was evaluated"
    )
    parser.add_argument(
        "--output", type=command_line.local_path, metavar="FILE", help="file to write (default: RUN/MODEL_CARD.md)"
    )
    arguments = parser.parse_args(argv)
    path = arguments.output or arguments.run / "MODEL_CARD.md"
    if os.path.lexists(path):  # perhaps edited, or something else
        raise UserError(f"{path} exists and is not overwritten: move it away, or give another --output")
    files.write_text(path, card(arguments.run))
    print(path)
