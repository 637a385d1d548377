"""Search, or join a search: `python -m resnet_jax.search --config configs/search.py --study NAME [--storage WHERE]`.

`python -m resnet_jax.search report --study NAME [--storage WHERE]` writes its page and `configs/found.py`.
"""

import os
import signal
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from resnet_jax import cli
from resnet_jax.errors import UserError
from resnet_jax.search import STAGES, check_folder, default_storage, default_workdir, is_name
from resnet_jax.search.fields import SEARCH_FIELDS

flags.declare_key_flag("config")
STUDY = flags.DEFINE_string("study", None, "Name of the search; a worker that gives the same joins it.")
STORAGE = flags.DEFINE_string(
    "storage",
    None,
    "Path of a journal file, for one machine or a shared file system, or postgresql://USER@HOST/DATABASE; "
    "WORKDIR/study.journal if not given.",
)
STAGE = flags.DEFINE_enum("stage", "all", ["all", *STAGES], "Stage to take part in; all of them in turn.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the trials' runs, shared by all workers; runs/search/STUDY if not given."
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes to start here, each with a GPU, or a share of the cores; 0 for one a GPU.", lower_bound=0
)
DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the grid with parameters, GFLOP and feasibility, and end.")


def main(config: ConfigDict) -> None:
    """Run what the flags say."""
    name = STUDY.value or ""
    if not DRY_RUN.value and not is_name(name):
        raise UserError(f"--study is {name!r}: give the search a name, of letters, digits, '.', '_' and '-'")
    if not config.data.validation_ratio:
        raise UserError("config.data.validation_ratio is 0: validation accuracy decides a search, so set it to 0.1")
    root = Path(os.path.expanduser(WORKDIR.value or default_workdir(name))).absolute()
    if root.exists() and not root.is_dir():
        raise UserError(f"--workdir {root} is not a folder: give another")
    where = STORAGE.value or str(default_storage(root))

    from resnet_jax.search import (  # only now that the config is checked, for importing takes seconds
        local_workers,
        space,
        studies,
    )

    space.check(config)
    if not DRY_RUN.value:
        gpus = local_workers.local_gpus() if WORKERS.value != 1 else []
        count = WORKERS.value or max(1, len(gpus))
        local_workers.check(count, gpus)
        check_folder(root)
        if count > 1:
            with studies.opened(where, create=True):
                pass  # so that what is wrong with it is told once
            command = [sys.executable, "-m", "resnet_jax.search", *sys.argv[1:], "--workers=1"]
            sys.exit(local_workers.run(command, count, gpus))

    from resnet_jax.runs import preemption
    from resnet_jax.search import worker

    if DRY_RUN.value:
        for line in worker.dry_run(worker.Worker(config, "", studies.in_memory(), Path())):
            print(line, flush=True)
        return
    with studies.opened(where, create=True) as storage:
        try:
            worker.Worker(config, name, storage, root).run(STAGES if STAGE.value == "all" else (STAGE.value,))
        except preemption.TrainingInterrupted as stop:
            print(f"{stop}; the same command goes on with the search", file=sys.stderr)
            sys.exit(stop.exit_code)
        except KeyboardInterrupt:
            print("stopped by SIGINT between trials: the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        from resnet_jax.search import report

        report.main(sys.argv[2:])
    else:
        cli.run(main, SEARCH_FIELDS)
