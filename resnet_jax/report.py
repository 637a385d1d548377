"""Draw a run's curves: `python -m resnet_jax.report runs/final [--output curves.png]`."""

import argparse
import json
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError, exit_on_user_error

_STYLES = {"train": ("#4477aa", "-", ""), "validation": ("#ee6677", "-", "."), "test": ("#228833", "", "*")}


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`.

    Raises:
        UserError: where there are none.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a run that was killed leaves half a line
        if not all({"epoch", "split"} <= row.keys() for row in rows):
            raise ValueError("a row lacks epoch or split")
        if not all(
            isinstance(value, (int, float, type(None))) for row in rows for value in (row | {"split": 0}).values()
        ):
            raise ValueError("a figure is no number")
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a run") from error
    if not rows:
        raise UserError(f"{path} is empty: train first")
    return rows


def draw_curves(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw loss, accuracy and learning rate over epochs into a file, of the kind its suffix names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate"), strict=True):
        for split, (colour, line, marker) in _STYLES.items():
            points = [(row["epoch"], row[quantity]) for row in rows if row["split"] == split and quantity in row]
            if points:
                label = f"{split} {points[-1][1]:.2%}" if quantity == "accuracy" else split
                axes.plot(*zip(*points, strict=True), color=colour, ls=line or "none", marker=marker, label=label)
        axes.set(xlabel="epoch", title=quantity.replace("_", " "))
        axes.grid(alpha=0.3)
        if quantity != "learning_rate":
            axes.legend()
    try:
        output.parent.mkdir(exist_ok=True)
        figure.savefig(output, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m resnet_jax.report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="file to draw to (default: RUN/report/curves.png)")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        rows = read_rows(arguments.run)
        output = arguments.output or arguments.run / "report" / "curves.png"
        draw_curves(rows, output)
        print(output)


if __name__ == "__main__":
    main()
