"""Where a search is kept: an Optuna study a stage, in a journal file or in PostgreSQL."""

import json
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
from ml_collections import ConfigDict
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config
from resnet_jax.search import STAGES
from resnet_jax.search.locks import JournalLock

# config.search.objective -> what is optimized, and where to
OBJECTIVES: dict[str, dict[str, Literal["minimize", "maximize"]]] = {
    "accuracy": {"accuracy": "maximize"},
    "accuracy_params": {"accuracy": "maximize", "num_params": "minimize"},
    "accuracy_seconds": {"accuracy": "maximize", "seconds_per_epoch": "minimize"},
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

Storage = optuna.storages.BaseStorage


@contextmanager
def opened(where: str, create: bool) -> Iterator[Storage]:
    """A storage; whatever fails in it while it is open becomes one line.

    Args:
        where: the path of a journal file, or a URL that begins with "postgresql://".
        create: make the journal where it is not there.

    Raises:
        UserError: where it is neither, or cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" not in where:
            yield _journal(Path(where).expanduser(), create)
        elif re.match(r"postgres(ql)?://", where):
            database = _database(where)
            try:
                yield database
            finally:
                database.remove_session()
                database.engine.dispose()
        else:
            raise UserError(
                f"--storage {_shown(where)}: give the path of a journal file, or postgresql://USER@HOST/DATABASE"
            )
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(f"--storage {_shown(where)} cannot be used ({reason}): fix this, or give another") from error


def _shown(url: str) -> str:
    """A URL without user, password and settings."""
    return re.sub(r"^([^:]+://)(?:.*@)?([^?@]*).*$", r"\1\2", url)


def _database(url: str) -> RDBStorage:
    # A server may close a connection that is idle while a trial trains, so each is tried before it is used.
    driver = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    connect = partial(RDBStorage, driver, engine_kwargs={"pool_pre_ping": True})
    try:
        for seconds in (0.2, 0.5, 1.0, 2.0):
            try:
                return connect()
            except (IntegrityError, ProgrammingError):  # another worker makes the tables at this moment
                time.sleep(seconds)
        return connect()
    except ValueError as error:
        raise UserError(f"--storage {_shown(url)} is not the URL of a database ({error}): fix it") from error
    except ImportError as error:
        raise UserError("--storage: PostgreSQL needs psycopg: pip install -e '.[postgresql]'") from error


def _journal(path: Path, create: bool) -> JournalStorage:
    """A journal, which is checked before anything is written beside it."""
    hint = "give the path of a search's journal" + ", or of a new file" * create
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        if path.exists():
            with path.open() as file:
                first = json.loads(file.readline() or '{"op_code": 0}')  # an empty file is a journal to be
            if not isinstance(first, dict) or "op_code" not in first:
                raise ValueError("it is no journal")
        elif not create:
            raise UserError(f"--storage {path} is not there: check --study, or {hint}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
    except (OSError, ValueError) as error:
        raise UserError(f"--storage {path} cannot be used ({error}): {hint}") from error


def create(storage: Storage, name: str, stage: str, config: ConfigDict) -> optuna.Study:
    """The study of a stage, made where it is not there.

    Args:
        storage: that holds it.
        name: of the search.
        stage: one of `STAGES`.
        config: of the search; a study that is there must have the same, but for what changes no result.

    Raises:
        UserError: where the study is of another config.
    """
    study = optuna.create_study(
        study_name=f"{name}-{stage}",
        storage=storage,
        load_if_exists=True,
        directions=[*OBJECTIVES[config.search.objective].values()],
    )
    stored = study.user_attrs.get("config")
    if stored and (differences := stored_config.differences(config, stored)):
        raise UserError(
            f"--study {name} is of another config ({'; '.join(differences)}): give another --study, or its own values"
        )
    return study


def begun(storage: Storage, name: str) -> dict[str, optuna.Study]:
    """Stage -> study, of the stages of a search that have begun."""
    names = optuna.get_all_study_names(storage)
    found = {s: optuna.load_study(study_name=f"{name}-{s}", storage=storage) for s in STAGES if f"{name}-{s}" in names}
    return {stage: study for stage, study in found.items() if "candidates" in study.user_attrs}


def existing(storage: Storage, name: str) -> dict[str, optuna.Study]:
    """As `begun`.

    Raises:
        UserError: where no stage has begun.
    """
    found = begun(storage, name)
    if not found:
        there = sorted({known.rpartition("-")[0] for known in optuna.get_all_study_names(storage)})
        raise UserError(
            f"--study {name} has not begun in this storage, which has {', '.join(there) or 'none'}: give one of them"
        )
    return found


def best_first(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials, by validation accuracy."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-trial.values[0], trial.number))


def sampler(choices: dict[str, list[Any]], seed: int) -> optuna.samplers.BaseSampler:
    """What proposes the next trial of a stage: all combinations of `choices` in turn, or TPE where there are none."""
    if choices:
        return _Grid(choices, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)


class _Grid(optuna.samplers.GridSampler):
    """Optuna's, for a loop that ends by itself."""

    def after_trial(self, *_: Any) -> None:
        """Do not stop `Study.optimize`, which is not running."""


def in_memory() -> Storage:
    """A storage for what needs none."""
    return optuna.storages.InMemoryStorage()
