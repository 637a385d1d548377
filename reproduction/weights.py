"""Ship what a run learnt: `python -m reproduction.weights RUN --name NAME`.

It writes weights/NAME.safetensors, the best checkpoint in float32 with its kernels stored in float16; weights/NAME.md, its model
card; and results/weights-NAME.json, the test accuracy before and after rounding. The run must be complete and evaluated.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.disk import files
from resnet_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def accuracies(model: Any, images: Any, labels: np.ndarray) -> dict[str, float]:
    """The accuracy of a network on images, and that of the mean over each image and its mirror image."""
    return {
        name: float(np.mean(model.logits(images, views).argmax(axis=1) == labels))
        for name, views in (("accuracy", 1), ("accuracy_flip", 2))
    }


def ship(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the weights and their card; return the result."""
    from resnet_jax import train_state
    from resnet_jax.data import datasets
    from resnet_jax.inference import export, trained_model
    from resnet_jax.reporting import model_card
    from resnet_jax.runs import environment
    from resnet_jax.runs.result import RunResult

    run = RunResult.read(arguments.run, "give another run")
    model = trained_model.load(arguments.run).in_float32()
    dataset = datasets.load(model.config.data)
    if dataset.fingerprint != run.dataset["fingerprint"]:
        raise UserError(f"{model.config.data.name} is not the data that {arguments.run} was trained on")
    card = model_card.card(arguments.run, shipped_as=arguments.name)
    path = ROOT / "weights" / f"{arguments.name}.safetensors"
    export.write(model, "safetensors", path, float16=True)
    shipped = trained_model.load(path)
    files.write_text(path.with_suffix(".md"), card)
    return {
        "weights": arguments.name,
        "bytes_of_file": path.stat().st_size,
        "digest": train_state.digest(shipped.variables),
        "test_images": len(dataset.test.labels),
        "float32": accuracies(model, *dataset.test),
        "float16": accuracies(shipped, *dataset.test),
        "environment": environment.collect(),
    }


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m reproduction.weights", __doc__)
    parser.add_argument(
        "run", type=command_line.local_path, metavar="RUN", help="workdir of a complete run that was evaluated"
    )
    parser.add_argument("--name", required=True, help="the name that `load` takes")
    arguments = parser.parse_args(argv)
    output = ROOT / "results" / f"weights-{arguments.name}.json"
    files.write_json(output, ship(arguments))
    print(output)


if __name__ == "__main__":
    command_line.run(main)
