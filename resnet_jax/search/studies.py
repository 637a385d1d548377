"""Store a search: one Optuna study per stage, in a journal file or in PostgreSQL."""

import json
import os
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
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from resnet_jax.errors import UserError, reason
from resnet_jax.runs import stored_config
from resnet_jax.search import STAGES
from resnet_jax.search.locks import JournalLock

# config.search.objective -> what is optimized, and in which direction
OBJECTIVES: dict[str, dict[str, Literal["minimize", "maximize"]]] = {
    "accuracy": {"accuracy": "maximize"},
    "accuracy_params": {"accuracy": "maximize", "num_params": "minimize"},
    "accuracy_seconds": {"accuracy": "maximize", "seconds_per_epoch": "minimize"},
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

Storage = optuna.storages.BaseStorage


@contextmanager
def opened(where: str, create: bool) -> Iterator[Storage]:
    """Open a storage; turn its errors into user errors while it is open.

    Args:
        where: the path of a journal file, or a URL that begins with "postgresql://".
        create: create the journal if it does not exist.

    Raises:
        UserError: if it is neither, or cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" not in where:
            yield _journal(Path(os.path.expanduser(where)), create)
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
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise UserError(f"--storage {_shown(where)} cannot be used ({reason}): fix this, or give another") from error


def _shown(url: str) -> str:
    """Return a URL without user, password and settings."""
    return re.sub(r"^([^:]+://)(?:.*@)?([^?@]*).*$", r"\1\2", url)


def _database(url: str) -> RDBStorage:
    # A server may close connections that are idle while a trial trains, so each is tested before use.
    driver = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    connect = partial(RDBStorage, driver, engine_kwargs={"pool_pre_ping": True})
    try:
        for seconds in (0.2, 0.5, 1.0, 2.0):
            try:
                return connect()
            except (IntegrityError, ProgrammingError):  # another worker is creating the tables
                time.sleep(seconds)
        return connect()
    except ValueError as error:
        raise UserError(
            f"--storage {_shown(url)} is not the URL of a database ({error}): use postgresql://USER@HOST/DATABASE"
        ) from error
    except ImportError as error:
        raise UserError("--storage: PostgreSQL needs psycopg: pip install 'resnet_jax[postgresql]'") from error


def _journal(path: Path, create: bool) -> JournalStorage:
    """Open a journal; check it before anything is written next to it."""
    hint = "give the path of a search's journal" + ", or of a new file" * create
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        if path.exists():
            with path.open(encoding="utf-8") as file:
                first = json.loads(file.readline() or '{"op_code": 0}')  # an empty file is a new journal
            if not isinstance(first, dict) or "op_code" not in first:
                raise ValueError("it is not a journal")
        elif not create:
            raise UserError(f"--storage {path} does not exist: check --study, or {hint}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
    except UserError:
        raise
    except Exception as error:  # Optuna replays the lines, and can raise anything for one that it did not write
        raise UserError(f"--storage {path} cannot be used ({reason(error)}): {hint}") from error


def create(storage: Storage, name: str, stage: str, config: ConfigDict) -> optuna.Study:
    """Load the study of a stage, or create it.

    Args:
        storage: the storage.
        name: name of the search.
        stage: one of `STAGES`.
        config: the search's config; that of an existing study may differ only in fields that change no result.

    Raises:
        UserError: if the study has another config.
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
            f"--study {name} has another config ({'; '.join(differences)}): use the same values, or another --study"
        )
    return study


def begun(storage: Storage, name: str) -> dict[str, optuna.Study]:
    """Return stage -> study for the stages of a search that have started."""
    names = optuna.get_all_study_names(storage)
    by_stage = {
        s: optuna.load_study(study_name=f"{name}-{s}", storage=storage) for s in STAGES if f"{name}-{s}" in names
    }
    return {stage: study for stage, study in by_stage.items() if "candidates" in study.user_attrs}


def existing(storage: Storage, name: str) -> dict[str, optuna.Study]:
    """Return the same as `begun`.

    Raises:
        UserError: if no stage has started.
    """
    by_stage = begun(storage, name)
    if not by_stage:
        others = sorted({known.rpartition("-")[0] for known in optuna.get_all_study_names(storage)})
        if name in others:
            raise UserError(
                f"--study {name} has no candidates yet: rerun the search, or wait until its first worker has begun"
            )
        raise UserError(
            f"--study {name} is not in this storage, which has {', '.join(others) or 'none'}: give one of them"
        )
    return by_stage


def best_first(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Sort the complete trials by validation accuracy, best first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-trial.values[0], trial.number))


def sampler(choices: dict[str, list[Any]], seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a stage: all combinations of `choices` in turn, or TPE if there are none."""
    if choices:
        return _Grid(choices, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)


class _Grid(optuna.samplers.GridSampler):
    """Optuna's grid sampler, for a loop that ends by itself."""

    def after_trial(self, *_: Any) -> None:
        """Do nothing: `Study.optimize`, which the original stops, is not running."""


def in_memory() -> Storage:
    """Return a temporary storage in memory."""
    return optuna.storages.InMemoryStorage()
