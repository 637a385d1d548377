"""The folder of a run: one process trains in it at a time, and every write checks that it is still the same folder."""

import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from resnet_jax.config import replaced
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import environment, processes, stored_config
from resnet_jax.runs.checkpoints import Checkpoints
from resnet_jax.runs.metrics_log import MetricsLog, Validation, validations
from resnet_jax.runs.result import RunResult
from resnet_jax.train_state import TrainState

INITIAL_WEIGHTS = "initial_weights.json"  # only in the folder of a run whose first weights were not drawn from the seed


def check(directory: Path, config: ConfigDict) -> ConfigDict:
    """Check that a folder can take a run of this config, or resume one; nothing is written.

    Where a run ended before its first checkpoint, nothing is left to resume: a run of any config can begin.

    Returns:
        The config; of a run that is resumed, with the numbers that it computed when it began.

    Raises:
        UserError: if the folder cannot be written, or its run has another config; the message names the fields.
    """
    check_writable(directory)
    remains = [*directory.glob("result.json"), *_checkpoints(directory)]
    if not (directory / "config.json").exists():
        if remains:
            raise UserError(f"{remains[0]} exists without the config.json of its run: choose another --workdir")
        return config
    return with_computed(directory, config) if remains else config


def check_writable(directory: Path) -> None:
    """Raise a `UserError` if a folder cannot be written, or made."""
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
    except OSError as error:
        raise UserError(f"--workdir {directory}: {error.strerror}: choose another") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = f"{directory}" if existing == directory else f"{directory}: {existing}"
        raise UserError(f"--workdir {what} is not a writable folder: choose another")


def with_computed(directory: Path, config: ConfigDict) -> ConfigDict:
    """Return a config with the numbers that a folder's run computed when it began.

    Raises:
        UserError: if the run has another config; the message names the fields.
    """
    stored = files.read_json(directory / "config.json")
    filled = stored_config.with_computed(config, stored)
    _refuse_differences(str(directory), filled, stored)
    return filled


def _refuse_differences(what: str, config: ConfigDict, stored: dict[str, Any]) -> None:
    if differences := stored_config.differences(config, stored):
        epochs = ", or --extend-to for more epochs" * any(line.startswith("num_epochs:") for line in differences)
        raise UserError(
            f"{what} holds a run with another config ({'; '.join(differences)}): choose another --workdir, or use the "
            f"values of that run{epochs}"
        )


def is_complete(directory: Path, config: ConfigDict) -> bool:
    """Whether a folder, which `check` accepts, holds the result of this config, and not of one with fewer epochs."""
    return _epochs_of_result(directory) == config.num_epochs


def _epochs_of_result(directory: Path) -> float | None:
    """The epochs of the run whose result a folder holds; None if it holds none."""
    if not (directory / "result.json").exists():
        return None
    epochs = RunResult.read(directory).config.get("num_epochs")
    if not isinstance(epochs, int | float):
        raise UserError(
            f"{directory}/result.json cannot be used (config.num_epochs is {epochs!r}): choose another --workdir"
        )
    return float(epochs)


def extended(directory: Path, config: ConfigDict, num_epochs: float) -> ConfigDict:
    """Return the config with which the run of a folder continues to `num_epochs`: its schedule begins anew where it ended.

    Args:
        directory: of the run, extended or not.
        config: of the run as it began.
        num_epochs: of the extended run.

    Raises:
        UserError: if the folder holds no such run, or one of more epochs.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"--extend-to {num_epochs:g}: {directory} holds no run: train it first, or give its --workdir")
    as_json = files.read_json(directory / "config.json")
    stored, config = stored_config.from_json(as_json), stored_config.with_computed(config, as_json)
    epochs = [
        {"num_epochs": of.num_epochs, "schedule.restart_epochs": of.schedule.restart_epochs} for of in (config, stored)
    ]
    extends = not stored_config.differences(stored, stored_config.to_json(replaced(stored, epochs[0])))
    _refuse_differences(str(directory), replaced(config, epochs[1]) if extends else config, as_json)
    _refuse_differences(str(directory), stored, stored_config.to_json(config))  # a config that extends the stored one
    if num_epochs < stored.num_epochs:
        raise UserError(f"--extend-to {num_epochs:g}: {directory} has {stored.num_epochs:g} epochs already: give more")
    if num_epochs != stored.num_epochs:
        stored = stored_config.extended(stored, num_epochs)
    restarts = stored.schedule.restart_epochs
    return replaced(config, {"num_epochs": stored.num_epochs, "schedule.restart_epochs": restarts})


def check_meta(directory: Path, config: ConfigDict, fingerprint: str, meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another config or of other data.

    Args:
        directory: of the run.
        config: of the run.
        fingerprint: of the data set.
        meta: of the checkpoint.

    Raises:
        UserError: naming the fields that differ, or both fingerprints.
    """
    _refuse_differences(f"{directory}/checkpoints", config, meta["config"])
    check_data(config.data.name, fingerprint, meta["fingerprint"])


def check_data(name: str, fingerprint: str, expected: str) -> None:
    """Refuse data that are not those of a run, wherever they are.

    Args:
        name: of the data set.
        fingerprint: of the data set.
        expected: fingerprint of the run's data.

    Raises:
        UserError: naming both fingerprints.
    """
    if fingerprint != expected:
        raise UserError(
            f"{name} has changed since the run began (fingerprint {expected[:12]} then, {fingerprint[:12]} now): use the "
            "original data, or choose another --workdir"
        )


def has_checkpoint(directory: Path) -> bool:
    """Whether a run has a checkpoint to resume from, intact or not."""
    return bool(_checkpoints(directory))


def _checkpoints(directory: Path) -> list[Path]:
    """The folders of a run's checkpoints; others there are incomplete."""
    return [path for path in directory.glob("checkpoints/*/") if path.name.isdecimal()]


def initial_weights(directory: Path) -> dict[str, Any] | None:
    """Where the weights that a run started from come from, as in `RunResult`; None if they were drawn from the seed."""
    path = directory / INITIAL_WEIGHTS
    return files.read_json(path) if path.exists() else None


class Workdir:
    """The folder of a run, open in this process. Only the first of several processes writes metrics and JSON files.

    Args:
        path: of the folder.
        config: of the run.
        meta: kept with every checkpoint: {"config", "fingerprint", "class_names", "image_shape"}.
        lock: the open lock file; None in a process other than the first.

    Attributes:
        path: of the folder.
        validations: by step, of the run so far.
    """

    def __init__(self, path: Path, config: ConfigDict, meta: Mapping[str, Any], lock: IO[str] | None) -> None:
        self.path, self._config, self._meta, self._lock = path, config, meta, lock
        self._check_meta = partial(check_meta, path, config, meta["fingerprint"])
        self.validations = validations(path)
        self._checkpoints = Checkpoints(path / "checkpoints", self.validations)
        self._log: MetricsLog | None = None
        self._saved_at, self._saved_step = time.monotonic(), -1

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None before the first."""
        return self._checkpoints.latest

    def check_lock(self) -> None:
        """Check that the folder is the one that was locked.

        Raises:
            UserError: if it was deleted, or replaced by another.
        """
        if self._lock is None:
            return
        path = self.path / ".lock"
        if not path.exists() or not os.path.samestat(os.fstat(self._lock.fileno()), path.stat()):
            raise UserError(f"{self.path} was deleted or replaced during the run: rerun the command")

    def restore(self, initial: TrainState) -> tuple[TrainState, float]:
        """The state of the newest intact checkpoint, and the seconds spent until then; `initial` and 0.0 if there is none.

        Rows logged after that step are dropped, because they will be logged again. The config of this session is written,
        and where it extends a complete run, that run's result gets another name.
        """
        restored = self._checkpoints.restore_newest(initial, self._check_meta)
        state, seconds = (restored[0], restored[1]["seconds"]) if restored else (initial, 0.0)
        step = int(state.step)
        for later in [s for s in self.validations if s > step]:
            del self.validations[later]
        if self._lock:
            if not restored:
                (self.path / INITIAL_WEIGHTS).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            epochs = _epochs_of_result(self.path)
            if epochs is not None and epochs != self._config.num_epochs:
                self.check_lock()
                (self.path / "result.json").replace(self.path / f"result-{epochs:g}-epochs.json")
            self.write_json("config.json", stored_config.to_json(self._config))
            self._log = MetricsLog(self.path, step)
        return state, seconds

    def start_from(self, state: TrainState, origin: dict[str, Any]) -> None:
        """Save the state of step 0, and where its weights come from: it is then all that the run needs."""
        self.write_json(INITIAL_WEIGHTS, origin)
        self.save(state, seconds=0.0)
        self.wait()

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`; a validation row counts for the choice of the best checkpoint."""
        if self._log:
            self.check_lock()
            self._log.write(row)
        if row["split"] == "validation":
            self.validations[row["step"]] = Validation.of(row)

    def save(self, state: TrainState, seconds: float) -> None:
        """Start writing a checkpoint; `seconds` were spent on the run until now."""
        self.check_lock()
        self._checkpoints.save(state, {**self._meta, "seconds": seconds}, check=self.check_lock)
        self._saved_at, self._saved_step = time.monotonic(), int(state.step)

    def save_is_due(self) -> bool:
        """Whether the last save, or the start of this session, is `config.checkpoint_every_minutes` ago."""
        minutes = self._config.checkpoint_every_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def wait(self) -> None:
        """Return once every checkpoint is written.

        Raises:
            UserError: if one cannot be written.
        """
        self._checkpoints.wait()

    def restore_best(self, like: TrainState) -> tuple[TrainState, int]:
        """The state of the best checkpoint and its step; `like` has its shapes and shardings."""
        step = self._checkpoints.choose("best")
        return self._checkpoints.restore(step, like, self._check_meta)[0], step

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of this folder."""
        if self._lock:
            self.check_lock()
            files.write_json(self.path / name, value)

    def write_result(self, result: RunResult) -> None:
        """Write `result.json`, which completes the run."""
        if self._lock:
            self.check_lock()
            result.write(self.path)

    def close(self) -> None:
        """Close the log and the checkpoints; call `wait` first to learn of failed writes."""
        if self._log:
            self._log.close()
        self._checkpoints.close()
        if self._lock and not (self.path / ".lock").exists():
            self._remove_stray()

    def _remove_stray(self) -> None:
        """Remove the checkpoint that Orbax made in a new folder, where the run's was deleted while the save began."""
        shutil.rmtree(self.path / "checkpoints" / str(self._saved_step), ignore_errors=True)
        with suppress(OSError):  # others put something there, or the folder is already gone
            (self.path / "checkpoints").rmdir()
            self.path.rmdir()


@contextmanager
def open_workdir(
    directory: Path, config: ConfigDict, meta: Mapping[str, Any], bytes_needed: int = 0
) -> Iterator[Workdir]:
    """Make the folder of a run, lock it, and write the environment of this session, and the config of a new run.

    The lock is the kernel's: it goes with the process that holds it, however that ends.

    Args:
        directory: of the run.
        config: of the run.
        meta: as `Workdir` takes it.
        bytes_needed: by its checkpoints; the part that they do not take yet must be free on their disk.

    Raises:
        UserError: if the folder cannot be written, its disk is too full, or another process is training in it.
    """
    with ExitStack() as stack:
        lock = stack.enter_context(_locked(directory, bytes_needed)) if jax.process_index() == 0 else None
        if lock:
            check(directory, config)
            files.remove_scratch(directory)  # of a session that was killed
            if not (directory / "config.json").exists():  # else `restore` writes it, if the data are those of the run
                files.write_json(directory / "config.json", stored_config.to_json(config))
            _record_environment(directory)
        if jax.process_count() > 1:
            _check_shared(directory, lock)
        workdir = Workdir(directory, config, meta, lock)
        stack.callback(workdir.close)
        yield workdir


def _record_environment(directory: Path) -> None:
    """Write the environment of this session, and warn if the session before had one in which sums round otherwise."""
    path, now = directory / "environment.json", environment.collect()
    if has_checkpoint(directory) and path.exists():
        try:
            changes = environment.changes(files.read_json(path, ("versions",)), now)
        except (AttributeError, UserError):  # the former where "versions" is no object
            changes = [f"{path} unreadable, so perhaps another machine or version"]
        if changes:
            print(
                f"warning: resuming with {', '.join(changes)}: the rest is the same up to rounding only",
                file=sys.stderr,
            )
    files.write_json(path, now)


@contextmanager
def _locked(directory: Path, bytes_needed: int) -> Iterator[IO[str]]:
    """The lock file of a folder, locked."""
    with ExitStack() as stack:
        with files.writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            path = files.readable(directory / ".lock")
            lock = stack.enter_context(path.open("a", encoding="utf-8"))  # "w" would erase the token of another process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{directory}: another process is training in it: choose another --workdir") from error
        except OSError as error:
            reason = f"cannot be locked ({error.strerror})"
            raise UserError(f"--workdir {directory} {reason}: choose a folder on a file system with flock") from error
        with files.writable(directory):
            checkpoints = directory / "checkpoints"  # perhaps a link to another disk
            free = shutil.disk_usage(checkpoints if checkpoints.is_dir() else directory).free
            taken = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
        if free < bytes_needed - taken:
            raise UserError(
                f"--workdir {directory}: its disk has {free / 1e6:,.1f} MB free, and the run's checkpoints take "
                f"{(bytes_needed - taken) / 1e6:,.1f} MB more: make room, or choose another"
            )
        yield lock


def _check_shared(directory: Path, lock: IO[str] | None) -> None:
    """Let no process go on before the first holds the lock, and refuse a folder that is not the first process's."""
    token = str(secrets.randbits(31)) if lock else "0"
    if lock:
        lock.truncate(0)
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
    token = str(int(multihost_utils.broadcast_one_to_all(np.int32(token))))

    def shows() -> bool:
        with suppress(OSError):
            return (directory / ".lock").read_text("utf-8") == token
        return False

    if not processes.wait_until_shown(shows):
        raise UserError(f"--workdir {directory} is not shared with the first process: use a shared folder")
