"""Write the page of the runs in results/, with the claims of the report that this project reimplements.

    python -m reproduction.report [RUN ...] --output DIR [--resnet18 FILE]

Without RUN it is about the runs and the comparison in results/. It is the page of `resnet_jax.reporting.report` with a table of claims and the report's numbers of the figures.
`make report` builds it.
"""

from collections.abc import Sequence
from functools import partial

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, run
from resnet_jax.disk import files
from resnet_jax.errors import UserError

NOTES = {  # the figures of the report that the page shows again
    "optimizers": "The report's figures 1 and 2.",
    "learning_rate": "The report's figure 3.",
    "loss": "The report's figure 4.",
    "accuracy": "The report's figure 5.",
    "architecture": "The report's figure 6.",
}


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    from absl import logging  # here, so that a missing package is one line

    from reproduction import claims, tables
    from resnet_jax.reporting import pages, report

    parser = ArgumentParser("python -m reproduction.report", __doc__)
    parser.add_argument(
        "runs", nargs="*", type=command_line.local_path, metavar="RUN", help="workdir of a complete run, or its summary"
    )
    parser.add_argument(
        "--output", type=command_line.local_path, required=True, metavar="DIR", help="folder to write the page to"
    )
    parser.add_argument(
        "--resnet18", type=command_line.local_path, metavar="FILE", help="output of `reproduction.reproduce resnet18`"
    )
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it only reads the folders
    pages.check_output(arguments.output)
    comparison = None
    if file := arguments.resnet18 or (None if arguments.runs else tables.comparison_file()):
        hint = "give the output of python -m reproduction.reproduce resnet18"
        comparison = files.read_json(file, hint=hint)
        try:
            claims.table([], comparison)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"--resnet18 {file} is not a comparison with ResNet-18 ({error!r}): {hint}") from error
    runs = [report.read_run(path) for path in arguments.runs or tables.run_files()]
    report.build(runs, arguments.output, partial(claims.table, comparison=comparison), NOTES)
    print(arguments.output / "index.html")


if __name__ == "__main__":
    run(main)
