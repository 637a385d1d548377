"""What a run leaves in its folder, besides checkpoints: JSON files, `metrics.jsonl`, TensorBoard events."""

import fcntl
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from resnet_jax import config as config_lib
from resnet_jax.errors import UserError
from resnet_jax.runs import environment, files

INITIAL_WEIGHTS = "initial_weights.json"  # only in the folder of a run that started from a file's weights


def check(directory: Path, config: ConfigDict) -> None:
    """Check that a folder can take, or go on with, a run of this config; nothing is written.

    Raises:
        UserError: where the folder cannot be written, or its run has another config, naming the fields that differ.
    """
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
    except OSError as error:
        raise UserError(f"--workdir {directory}: {error.strerror}: choose another") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--workdir {directory}: {existing} is not a folder that can be written: choose another")
    if not (directory / "config.json").exists():
        if left := [*directory.glob("result.json"), *directory.glob("checkpoints/*[0-9]/")]:
            raise UserError(f"{left[0]} is there and no config.json to say of what run: choose another --workdir")
        return
    refuse_differences(str(directory), config, files.read_json(directory / "config.json"))


def refuse_differences(what: str, config: ConfigDict, stored: dict[str, Any]) -> None:
    """Refuse a stored config that differs from this one in a field that changes the result, naming those fields."""
    if differences := config_lib.differences(config, stored):
        raise UserError(
            f"{what} holds a run of another config ({'; '.join(differences)}): choose another --workdir, or give the run's "
            "own values"
        )


@contextmanager
def open_workdir(directory: Path, config: ConfigDict, bytes_needed: int = 0) -> Iterator[Callable[[], None]]:
    """Make the folder of a run, lock it, and note the config and the environment of this session.

    The lock is the kernel's: it goes with the process that holds it, however that ends.

    Args:
        directory: of the run.
        config: of the run.
        bytes_needed: that its checkpoints may take; what they do not take yet must be free on their disk.

    Yields:
        A function to call before each write, which raises a `UserError` once the folder is no longer the one that was
        locked: deleted, or replaced by another.

    Raises:
        UserError: where the folder cannot be written, its disk is too full, or another process is training in it.
    """
    path = directory / ".lock"
    if jax.process_index() > 0:
        token = _from_the_first("")
        if not path.exists() or path.read_text() != token:
            raise UserError(f"--workdir {directory} is not the first process's, or not shared with it: share one")
        yield lambda: None
        return
    with ExitStack() as stack:
        with files.writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.open("w"))
            checkpoints = directory / "checkpoints"  # perhaps a link to another disk
            free = shutil.disk_usage(checkpoints if checkpoints.is_dir() else directory).free
            taken = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{directory}: another process is training in it: choose another --workdir") from error
        if free < bytes_needed - taken:
            raise UserError(
                f"--workdir {directory}: its disk has {free / 1e6:,.1f} MB free, and the run's checkpoints take "
                f"{(bytes_needed - taken) / 1e6:,.1f} MB more: make room, or choose another"
            )
        check(directory, config)
        for left in directory.glob(".incomplete-*"):  # by a session that was killed
            shutil.rmtree(left, ignore_errors=True)
        files.write_json(directory / "config.json", config_lib.to_json(config))
        files.write_json(directory / "environment.json", environment.collect())

        def check_lock() -> None:
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise UserError(f"{directory} was deleted or replaced under way: start the run again")

        if jax.process_count() > 1:
            token = str(secrets.randbits(31))
            lock.write(token)
            lock.flush()
            os.fsync(lock.fileno())
            _from_the_first(token)
        yield check_lock


def _from_the_first(token: str) -> str:
    """What the first process has in its lock, once it holds it: no other may read the folder before."""
    return str(int(multihost_utils.broadcast_one_to_all(np.int32(token or 0))))


def initial_weights(directory: Path) -> dict[str, Any] | None:
    """The file that a run's weights came from, with its SHA-256; None where they were drawn from the seed."""
    path = directory / INITIAL_WEIGHTS
    return files.read_json(path) if path.exists() else None


def _lines(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of `metrics.jsonl`, each with its row; {} for a line that is none, or was cut off."""
    path = directory / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [(line, _row(line)) for line in text.splitlines(keepends=True)]


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    whole = line.endswith("\n") and isinstance(row, dict) and type(row.get("step")) is int and "split" in row
    return row if whole else {}


def metrics_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    return [row for _, row in _lines(directory) if row]


def validation_accuracies(directory: Path) -> dict[int, float]:
    """Step -> accuracy, from the validation rows of `metrics.jsonl`."""
    return {
        row["step"]: row["accuracy"]
        for row in metrics_rows(directory)
        if row["split"] == "validation" and isinstance(row.get("accuracy"), float)
    }


class MetricsLog:
    """The rows of `metrics.jsonl`, and the same figures as TensorBoard events; only process 0 writes.

    Args:
        directory: of the run.
        resume_step: rows that will come again are dropped: those of later steps, those of the test split, which ends
            a run, and a line that was cut off.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        self._primary = jax.process_index() == 0
        if not self._primary:
            return
        self._path, self._events_path = directory / "metrics.jsonl", directory / "tensorboard"
        with files.writable(self._events_path):
            self._events_path.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
            self._events = RecordWriter((self._events_path / name).open("wb", buffering=0))
        self._write_event(file_version="brain.Event:2")
        lines = _lines(directory)
        kept = [line for line, row in lines if row and row["step"] <= resume_step and row["split"] != "test"]
        if len(kept) < len(lines):
            files.write_text(self._path, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; "step", "epoch" and "split" name it, the rest are its figures."""
        if not self._primary:
            return
        with files.writable(self._path), self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        figures = {k: v for k, v in row.items() if k not in ("step", "epoch", "split") and v is not None}
        values = [Summary.Value(tag=f"{row['split']}/{name}", simple_value=v) for name, v in figures.items()]
        self._write_event(step=row["step"], summary=Summary(value=values))

    def _write_event(self, **fields: Any) -> None:
        with files.writable(self._events_path):
            self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Close the events."""
        if self._primary:
            self._events.close()
