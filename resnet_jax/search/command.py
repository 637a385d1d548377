"""The tools `search` and `search report`; they check their arguments before they import JAX and Optuna."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.errors import UserError
from resnet_jax.search import STAGES, check_folder, default_storage, default_workdir, is_name
from resnet_jax.search.fields import SEARCH_FIELDS

_SEARCH = """Search for a network and a recipe within a budget, or join a search.

    python -m resnet_jax search --config search --study NAME
    python -m resnet_jax search --config search --study NAME --storage postgresql://USER@HOST/DATABASE

Every process with the same --study and --storage joins the search. `python -m resnet_jax search report` shows it.
"""
_REPORT = """Write a page about a search, and the config that it found.

    python -m resnet_jax search report --study NAME

DIR/index.html is self-contained; DIR/figures holds each figure as PNG and SVG. `train` takes the config of --found.
"""


def main(argv: Sequence[str]) -> None:
    """Run the tool `search`."""
    parser = ArgumentParser("python -m resnet_jax search", _SEARCH)
    command_line.add_config_arguments(parser)
    parser.add_argument(
        "--study", default="", metavar="NAME", help="name of the search; workers with the same name join it"
    )
    parser.add_argument(
        "--storage",
        metavar="WHERE",
        help="journal file, for one machine or a shared file system, or postgresql://USER@HOST/DATABASE "
        "(default: WORKDIR/study.journal)",
    )
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="stage to take part in (default: all)")
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the trials' runs, shared by all workers (default: runs/search/NAME)"
    )
    parser.add_argument(
        "--workers",
        type=command_line.whole_number(0),
        default=0,
        metavar="N",
        help="processes to start on this machine, each with a GPU or a share of the cores (default: 0, one per GPU)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the grid with parameters, GFLOP and feasibility, and exit"
    )
    arguments, config = command_line.parse_config(parser, argv, SEARCH_FIELDS)
    name = arguments.study
    if not arguments.dry_run and not is_name(name):
        raise UserError(f"--study is {name!r}: use a name of letters, digits, '.', '_' and '-'")
    if not config.data.validation_ratio:
        raise UserError("config.data.validation_ratio is 0, but a search needs validation accuracy: set it to 0.1")
    if config.init_from:
        raise UserError("config.init_from fits one network, but a search trains many: leave it out")
    root = command_line.folder(arguments.workdir or default_workdir(name))
    if root.exists() and not root.is_dir():
        raise UserError(f"--workdir {root} is not a folder: give another")
    where = arguments.storage or str(default_storage(root))

    from resnet_jax.search import local_workers, space, studies  # after the checks, because JAX takes seconds to import

    local_workers.end_with_parent()
    space.check(config)
    if not arguments.dry_run:
        gpus = local_workers.local_gpus() if arguments.workers != 1 else []
        count = arguments.workers or max(1, len(gpus))
        local_workers.check(count, gpus)
        check_folder(root)
        if count > 1:
            with studies.opened(where, create=True):
                pass  # reports an error of the storage once, and not in every worker
            command = [sys.executable, "-m", "resnet_jax", "search", *argv, "--workers=1"]
            sys.exit(local_workers.run(command, count, gpus))

    from resnet_jax.runs import preemption
    from resnet_jax.search import worker

    if arguments.dry_run:
        for line in worker.dry_run(worker.Worker(config, "", studies.in_memory(), Path())):
            print(line, flush=True)
        return
    with studies.opened(where, create=True) as storage:
        try:
            worker.Worker(config, name, storage, root).run(STAGES if arguments.stage == "all" else (arguments.stage,))
        except preemption.TrainingInterrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.exit_code)
        except KeyboardInterrupt:
            print("stopped by SIGINT between trials: rerun the command to resume the search", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def main_report(argv: Sequence[str]) -> None:
    """Run the tool `search report`."""
    parser = ArgumentParser("python -m resnet_jax search report", _REPORT)
    parser.add_argument("--study", required=True, metavar="NAME", help="name of the search")
    parser.add_argument(
        "--workdir", type=command_line.local_path, metavar="DIR", help="folder of its runs (default: runs/search/NAME)"
    )
    parser.add_argument("--storage", metavar="WHERE", help="its storage (default: WORKDIR/study.journal)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--output",
        type=command_line.local_path,
        metavar="DIR",
        help="folder to write the page to (default: report-NAME)",
    )
    parser.add_argument(
        "--found",
        type=command_line.local_path,
        metavar="FILE",
        help="config to write (default: configs/found.py)",
    )
    target.add_argument(
        "--summary",
        type=command_line.local_path,
        metavar="FILE",
        help="write the summary of the search as JSON instead",
    )
    arguments = parser.parse_args(argv)
    name = arguments.study
    if not is_name(name):
        raise UserError(f"--study is {name!r}: use a name of letters, digits, '.', '_' and '-'")
    if arguments.summary and arguments.found:
        raise UserError("--summary writes no config: leave out --found")
    from resnet_jax.search import report  # after the checks, because JAX takes seconds to import

    where = arguments.storage or str(default_storage(arguments.workdir or default_workdir(name)))
    if arguments.summary:
        report.save_summary(name, where, arguments.summary)
    else:
        page, found = arguments.output or Path(f"report-{name}"), arguments.found or Path("configs/found.py")
        report.save_page(name, where, page, found)
